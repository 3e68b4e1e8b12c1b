"""What tells copies of one image apart, and what the sources said about those that were dropped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.copies.keepers import Ints, KeeperRule, Looks
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.stages.dedup.universe import Universe
from lodeset.pipeline.tables import records

SAID = ("label", "caption", "url", "licence")
# Entries of `metadata_of_copies` in one image's JSON; the table `copies` has them all.
MOST = 64


def looks_of(
    store: Store,
    images: Sequence[Artifact],
    universe: Universe,
    component: Ints,
    standing: NDArray[np.bool_],
    rules: Sequence[KeeperRule],
) -> Looks:
    """What the rules for keepers go by; of images that have no copy, nothing is read."""
    count = len(universe.ids)
    several = np.bincount(component, minlength=count)[component] > 1 if count else np.zeros(0, bool)
    row_of = {universe.ids[node]: int(node) for node in np.flatnonzero(several)}
    wanted = pa.array(list(row_of), pa.string())
    measured = {name: np.zeros(count) for name in ("detail", "sharpness", "quality")}
    said = np.zeros(count, np.int64)
    for artifact in images:
        for row in _rows(store, artifact.tables["images"], wanted, ("image_id", *measured), records.IMAGES):
            for name, column in measured.items():
                column[row_of[row["image_id"]]] = row[name] or 0.0
        if "metadata" in rules:
            for row in _rows(store, artifact.tables.get("metadata", ()), wanted, ("image_id", *SAID), records.METADATA):
                node = row_of[row["image_id"]]
                said[node] = max(said[node], sum(row[name] is not None for name in SAID))
    return Looks(
        standing=standing,
        area=universe.area,
        contrast=universe.thumbnails.var(axis=1),
        said=said,
        **measured,
    )


def _rows(
    store: Store, files: Iterable[File], wanted: pa.Array, columns: Sequence[str], schema: pa.Schema
) -> Iterable[dict[str, Any]]:
    for file in files:
        table = store.table([file], list(columns), schema)
        yield from table.filter(pc.is_in(table["image_id"], wanted)).to_pylist()


def stands_for(store: Store, dedup: Artifact) -> dict[str, list[str]]:
    """Kept image_id -> the copies that were dropped because of it."""
    table = store.table(dedup.tables["duplicates"], ["image_id", "kept", "reason", "matched_id"], records.DUPLICATES)
    dropped = pc.and_(pc.invert(table["kept"]), pc.is_in(table["reason"], pa.array(["near", "included"])))
    table = table.filter(pc.and_(dropped, pc.is_valid(table["matched_id"])))
    found: dict[str, list[str]] = {}
    for copy, kept in zip(table["image_id"].to_pylist(), table["matched_id"].to_pylist(), strict=True):
        found.setdefault(kept, []).append(copy)
    return found


def said_of_copies(
    wanted: Iterable[str], copies: Mapping[str, Sequence[str]], said: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Rows of `copies` for the wanted images, sorted. `said` holds the rows of `metadata` of every image and copy in the order of
    their sources: the first one of an image itself is its own, the others come from further places of the same bytes."""
    rows = []
    for image_id in sorted(wanted):
        own = said.get(image_id, ())
        told = [(image_id, row) for row in own[1:]]
        told += [(copy, row) for copy in sorted(copies.get(image_id, ())) for row in said.get(copy, ())]
        seen = {_key(image_id, own[0])} if own else set()
        for copy, row in told:
            key = _key(copy, row)
            if key not in seen:
                seen.add(key)
                rows.append({"image_id": image_id, "copy_id": copy, **{name: row[name] for name in (*SAID, "extra")}})
    return rows


def _key(copy: str, row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (copy, *(row[name] for name in (*SAID, "extra")))
