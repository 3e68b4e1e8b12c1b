"""What is left of the pool after dedup, as later stages read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.images.decoding import ID_HEX_DIGITS
from lodeset.pipeline.by_hand import BY_HAND
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.tables import records


def left_of_all(store: Store, dedup: Artifact) -> pa.ChunkedArray:
    """image_ids that dedup kept: of the pool, and of included sets."""
    table = store.table(dedup.tables["duplicates"], ["image_id", "kept"])
    return table["image_id"].filter(table["kept"])


def left_of_pool(store: Store, dedup: Artifact) -> pa.ChunkedArray:
    """image_ids of the pool that dedup kept; those that an included set brings itself are not among them."""
    table = store.table(dedup.tables["duplicates"], ["image_id", "kept", "reason"])
    own = pc.is_in(table["reason"], pa.array(["unique", BY_HAND]))
    return table["image_id"].filter(pc.and_(table["kept"], own))


def pool_kept(store: Store, dedup: Artifact) -> set[str]:
    """`left_of_pool` as a set."""
    return set(left_of_pool(store, dedup).to_pylist())


def fixed(ids: pa.ChunkedArray) -> NDArray[np.bytes_]:
    """image_ids as NumPy's 32 bytes each (dtype S32), which sort as their text does."""
    width = ID_HEX_DIGITS
    chunks = [chunk.cast(pa.binary(width)) for chunk in ids.chunks if len(chunk)]
    found = [np.frombuffer(c.buffers()[1], f"S{width}", len(c), c.offset * width) for c in chunks]
    return np.concatenate(found) if found else np.zeros(0, f"S{width}")


def rows_of(wanted: NDArray[np.bytes_], ids: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """The rows [N] of `ids`, which are sorted, that hold the wanted ones [N]; -1 where none does."""
    if not len(ids):
        return np.full(len(wanted), -1, np.int64)
    at = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    return np.where(ids[at] == wanted, at, -1)


def with_vector(store: Store, files: Sequence[File], wanted: set[str]) -> set[str]:
    """Which of the wanted image_ids have a row in `vectors`."""
    table = store.table(files, ["image_id"], records.vectors(1))
    return wanted & set(table["image_id"].to_pylist())
