"""The images and pairs of dedup's `edges` as numbers, with what its rules need to judge them again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.copies.keepers import Looks
from lodeset.pipeline.dag.stage import PREVIOUS
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.stages.copies import SAID
from lodeset.pipeline.stages.dedup.what_if import Compared, Joins, StoredPairs
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.kept import fixed, left_of_all, rows_of

Ids = NDArray[np.bytes_]


def read(store: Store, inputs: Mapping[str, Artifact], sets: Mapping[str, str]) -> tuple[Compared, pa.Table, int]:
    """The images that pairs name, the table `pairs`, and how many images of the pool dedup compared."""
    edges = _edges(store, inputs["dedup"])
    first, second = fixed(edges["image_id_a"]), fixed(edges["image_id_b"])
    ids = np.unique(np.concatenate([first, second]))
    images, pool = _images(store, inputs, sets, ids)
    rest = edges.drop_columns(["image_id_a", "image_id_b"])
    columns = {
        "a": np.searchsorted(ids, first).astype(np.int32),
        "b": np.searchsorted(ids, second).astype(np.int32),
        **{name: rest[name] for name in rest.column_names},
    }
    return images, pa.table(columns, schema=records.PAIRS), pool


def stored(pairs: pa.Table) -> StoredPairs:
    """The table `pairs` as arrays."""

    def numbers(name: str) -> NDArray[np.float32]:
        return np.asarray(pc.fill_null(pairs[name], np.nan).to_numpy(), np.float32)

    return StoredPairs(
        a=pairs["a"].to_numpy().astype(np.int64),
        b=pairs["b"].to_numpy().astype(np.int64),
        similarity=numbers("similarity"),
        distance=pairs["phash_distance"].to_numpy().astype(np.int64),
        min_score_limit=numbers("min_score_limit"),
        linked=pairs["linked"].to_numpy(zero_copy_only=False),
    )


def _edges(store: Store, dedup: Artifact) -> pa.Table:
    tables = [store.table([file]) for file in dedup.tables["edges"]]
    whole = pa.concat_tables([records.EDGES.empty_table(), *tables], promote_options="permissive")
    return whole.select(records.EDGES.names).cast(records.EDGES)


def _images(store: Store, inputs: Mapping[str, Artifact], sets: Mapping[str, str], ids: Ids) -> tuple[Compared, int]:
    """What dedup knew of these images (sorted), and how many images of the pool it compared."""
    count = len(ids)
    flag = {role: np.zeros(count, bool) for role in ("pool", "reference", "included")}
    area, said = np.zeros(count, np.int64), np.zeros(count, np.int64)
    measured = {name: np.zeros(count) for name in ("detail", "sharpness", "quality", "contrast")}
    masked = _sorted(store.table(inputs["masked"].tables["filtered"], ["image_id"], records.FILTERED))
    pool = 0
    for name, role in sets.items():
        if role not in flag or f"vectors:{name}" not in inputs:
            continue
        artifact = inputs[f"images:{name}"]
        embedded = _sorted(store.table(inputs[f"vectors:{name}"].tables["vectors"], ["image_id"], records.vectors(1)))
        for file in artifact.tables["images"]:
            table = store.table([file], ["image_id", "width", "height", "detail", "sharpness", "quality", "thumbnail"])
            those = fixed(table["image_id"])
            taken = rows_of(those, embedded) >= 0
            if role == "pool":
                taken &= rows_of(those, masked) < 0
            pool += int(taken.sum()) if role == "pool" else 0
            at = rows_of(those, ids)
            rows = np.flatnonzero(taken & (at >= 0))
            nodes, some = at[rows], table.take(pa.array(rows))
            flag[role][nodes] = True
            area[nodes] = some["width"].to_numpy().astype(np.int64) * some["height"].to_numpy()
            for column in ("detail", "sharpness", "quality"):
                measured[column][nodes] = pc.fill_null(some[column], 0.0).to_numpy()
            if len(rows):
                thumbnails = np.frombuffer(b"".join(some["thumbnail"].to_pylist()), np.uint8).reshape(len(rows), -1)
                measured["contrast"][nodes] = thumbnails.var(axis=1)
        for file in artifact.tables.get("metadata", ()):
            table = store.table([file], ["image_id", *SAID], records.METADATA)
            those = fixed(table["image_id"])
            at = rows_of(those, ids)
            rows = np.flatnonzero(at >= 0)
            told = np.asarray(sum(pc.is_valid(table[column]).to_numpy().astype(np.int64) for column in SAID))
            np.maximum.at(said, at[rows], told[rows])
    # Of all that are listed: those that a reference set drops now, another value of a setting may keep.
    by_hand = flag["pool"] & (rows_of(ids, np.sort(_kept_by_hand(store, inputs["masked"]))) >= 0)
    looks = Looks(standing=_standing(store, inputs, ids), area=area, said=said, **measured)
    names = ids.astype(str).tolist()
    return Compared(names, flag["pool"], flag["reference"], flag["included"], looks, by_hand), pool


def _standing(store: Store, inputs: Mapping[str, Artifact], ids: Ids) -> NDArray[np.bool_]:
    """Which images the next run finds kept by the one that it goes on from: this one, if it has written shards; what it went on from
    otherwise.
    """
    published: Artifact | None = inputs["dedup"]
    if "written" not in inputs:
        before = inputs["dedup"].inputs.get(PREVIOUS)
        published = store.artifact("dedup", "pool", before["fingerprint"]) if before is not None else None
    if published is None:
        return np.zeros(len(ids), bool)
    return rows_of(ids, np.sort(fixed(left_of_all(store, published)))) >= 0


def _sorted(table: pa.Table) -> Ids:
    return np.sort(fixed(table["image_id"]))


def _kept_by_hand(store: Store, masked: Artifact) -> Ids:
    """The images of the pool that lists of `by_hand.keep` name."""
    named = store.table(masked.tables.get("by_hand", ()), ["image_id", "action"], records.BY_HAND)
    return fixed(named["image_id"].filter(pc.equal(named["action"], "keep")))


def table_of(images: Compared) -> pa.Table:
    looks = images.looks
    columns = {name: getattr(looks, name) for name in records.COMPARED.names if hasattr(looks, name)}
    roles = {"pool": images.pool, "reference": images.reference, "included": images.included, "by_hand": images.by_hand}
    return pa.table({"image_id": pa.array(images.ids, pa.string()), **roles, **columns}, schema=records.COMPARED)


def read_table(table: pa.Table) -> Compared:
    """What `table_of` wrote."""
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "image_id"}
    roles = {name: columns.pop(name) for name in ("pool", "reference", "included", "by_hand")}
    return Compared(table["image_id"].to_pylist(), looks=Looks(**columns), **roles)


def read_joins(table: pa.Table, setting: str) -> Joins:
    """What the table `joins` says of one setting."""
    rows = table.filter(pc.equal(table["setting"], setting))
    columns = {name: rows[name].to_numpy() for name in ("limit", "a", "b", "dropped", "leaked", "groups", "largest")}
    for name in ("limit", "a", "b"):
        columns[name] = columns[name][1:]
    return Joins(**{**columns, "a": columns["a"].astype(np.int64), "b": columns["b"].astype(np.int64)})
