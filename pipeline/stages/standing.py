"""What the shards of the run before still hold of a selection, and what changed since: for write_shards and its report."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from lodeset.pipeline.dag.stage import Context, read_as
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.specs import WriteShardsDetails
from lodeset.pipeline.tables import records

ROOT = "shards"
# Why an image that shards hold is selected no more, where neither a filter nor dedup dropped it.
GONE, NOT_SELECTED = "gone", "not_selected"


@dataclass(frozen=True)
class Standing:
    """Rows of the index and of the tombstones before that still count (`live`), and those that do not (`dead`).

    `shard` is relative to any folder of shards. `files` are the shards with live rows; `numbered` how many were ever written;
    `were` the image_ids that counted before.
    """

    live: pa.Table
    dead: pa.Table
    files: tuple[File, ...]
    numbered: int
    were: pa.ChunkedArray


@dataclass(frozen=True)
class Told:
    """What lies beside the shards."""

    index: pa.Table
    tombstones: pa.Table
    changes: pa.Table
    copies: pa.Table


def shards_before(store: Store, previous: Artifact | None, selected: pa.ChunkedArray) -> Standing:
    """What the last run's shards hold. An image that was dropped and is wanted again counts where it lies, as long as others of
    its shard do."""
    nothing = records.SHARDS.empty_table()
    if previous is None:
        return Standing(nothing, nothing, (), 0, nothing["image_id"])
    written = read_as(WriteShardsDetails, previous.details)
    folder = written.folder
    index, buried = (
        store.table(previous.tables[name], records.SHARDS.names, records.SHARDS) for name in ("index", "tombstones")
    )
    held = pa.concat_tables([index, buried])
    shard = pa.array([_beside(folder, name) for name in held["shard"].to_pylist()], pa.string())
    held = held.set_column(held.schema.get_field_index("shard"), "shard", shard)
    known = {f"../{file.path.removeprefix(f'{ROOT}/')}": file for file in previous.tables["shards"]}
    wanted = pc.is_in(held["image_id"], selected.combine_chunks())
    readable = pc.is_in(held["shard"], pa.array(known, pa.string()))
    live, dead = held.filter(pc.and_(wanted, readable)), held.filter(pc.invert(wanted))
    files = tuple(known[name] for name in sorted(pc.unique(live["shard"]).to_pylist(), key=posixpath.basename))
    return Standing(live, dead, files, written.shards_numbered, index["image_id"])


def _beside(folder: str, shard: str) -> str:
    """A shard that an index in `folder` names, as an index in any other folder of shards names it."""
    return shard if shard.startswith("../") else f"../{posixpath.basename(folder)}/{shard}"


def tombstones(store: Store, context: Context, dead: pa.Table) -> pa.Table:
    """Images that lie in shards and count no more, and why."""
    return dead.append_column("reason", _reasons(store, context, dead["image_id"]))


def changes(
    context: Context, standing: Standing, buried: pa.Table, written: pa.ChunkedArray, selected: pa.Table
) -> pa.Table:
    """What the index lists that it did not before, and the other way round; nothing where there is no run before.

    An image was added because of the set and the mode that want it (the first by name), and removed for the reason of its
    tombstone.
    """
    if context.previous is None:
        return records.CHANGES.empty_table()
    revived = standing.live["image_id"].filter(pc.invert(pc.is_in(standing.live["image_id"], standing.were)))
    added = pa.chunked_array([*written.chunks, *revived.chunks], pa.string())
    wanted = pc.binary_join_element_wise(selected["set"], selected["mode"], " ")
    why = wanted.take(pc.index_in(added, value_set=selected["image_id"]))
    removed = buried.filter(pc.is_in(buried["image_id"], standing.were))
    rows = [
        pa.table([ids, pa.repeat(change, len(ids)), reasons], schema=records.CHANGES)
        for ids, change, reasons in ((added, "added", why), (removed["image_id"], "removed", removed["reason"]))
    ]
    return pa.concat_tables(rows)


def leaked(buried: pa.Table) -> list[str]:
    """What to say of shards that hold images which must not be trained on."""
    count = pc.sum(pc.equal(buried["reason"], "reference")).as_py() or 0
    if not count:
        return []
    return [
        f"{count} images that the shards still hold are copies of reference images: training goes by the index and leaves them "
        "out, a plain reader of the tars does not; `lodeset compact` writes shards without them"
    ]


def counted(told: pa.Table) -> dict[str, dict[str, int]]:
    """How many images were `added` and `removed`, by reason."""
    counts: dict[str, dict[str, int]] = {"added": {}, "removed": {}}
    for row in told.group_by(["change", "reason"]).aggregate([([], "count_all")]).sort_by("reason").to_pylist():
        counts[row["change"]][row["reason"]] = row["count_all"]
    return counts


def _reasons(store: Store, context: Context, ids: pa.ChunkedArray) -> pa.Array:
    duplicates = store.table(context.inputs["dedup"].tables["duplicates"], ["image_id", "kept", "reason"])
    filtered = store.table(context.inputs["masked"].tables["filtered"], ["image_id", "reason"], records.FILTERED)
    by_dedup = duplicates.take(pc.index_in(ids, value_set=duplicates["image_id"]))
    by_filter = filtered.take(pc.index_in(ids, value_set=filtered["image_id"]))
    reason = pc.if_else(by_dedup["kept"], NOT_SELECTED, by_dedup["reason"])
    return pc.coalesce(reason, by_filter["reason"], GONE).combine_chunks()
