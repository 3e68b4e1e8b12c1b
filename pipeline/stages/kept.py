"""What is left of the pool after dedup, as later stages read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import records
from pipeline.dag.store import Artifact, File, Store
from pipeline.stages.embed import read_vectors


def kept_ids(store: Store, dedup: Artifact) -> set[str]:
    """image_ids that dedup kept: of the pool, and of included sets."""
    table = store.table(dedup.tables["duplicates"], ["image_id", "kept"])
    return set(table["image_id"].filter(table["kept"]).to_pylist())


def pool_kept(store: Store, dedup: Artifact) -> set[str]:
    """image_ids of the pool that dedup kept; those that an included set brings itself are not among them."""
    table = store.table(dedup.tables["duplicates"], ["image_id", "kept", "reason"])
    return set(table["image_id"].filter(pc.and_(table["kept"], pc.equal(table["reason"], "unique"))).to_pylist())


def vectors_sorted(store: Store, files: Sequence[File], wanted: set[str]) -> tuple[list[str], NDArray[np.float16]]:
    """The wanted rows of `vectors`, in the order of their image_ids."""
    ids, matrix = read_vectors(store, files)
    rows = sorted((image_id, row) for row, image_id in enumerate(ids) if image_id in wanted)
    return [image_id for image_id, _ in rows], matrix[[row for _, row in rows]] if rows else matrix[:0]


def with_vector(store: Store, files: Sequence[File], wanted: set[str]) -> set[str]:
    """Which of the wanted image_ids have a row in `vectors`."""
    table = store.table(files, ["image_id"], records.vectors(1))
    return wanted & set(table["image_id"].to_pylist())
