"""filter (Ray): `images`, `scores`, `metadata` -> `filtered`, the pool images that are masked out before dedup, each with
its reason: that it was dropped by hand, or the first filter that it fails. No filter but those of URLs drops what is kept by hand.
Which images lists by hand name is told in `by_hand`.

Each filter reads the one table that it needs, file by file; no image is read here. Reference sets are not filtered, so that
a small or blurred reference image still finds its copies, and neither are curated sets: somebody chose their images.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lodeset.pipeline.by_hand import BY_HAND, Lists, identity_of, union
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import File, Part, Rows, Store
from lodeset.pipeline.engines.ray import map_items
from lodeset.pipeline.filters import Side, Table, failing
from lodeset.pipeline.filters import masks as listed
from lodeset.pipeline.filters.config import BLOCKED_DOMAIN, BLOCKED_URL
from lodeset.pipeline.shown import shown
from lodeset.pipeline.specs import FilterDetails, FilterRuntime, FilterSpec
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.forgotten import forgotten

VERSION = FilterSpec.VERSION
STAGE = "filter"
BLOCKED = (BLOCKED_DOMAIN, BLOCKED_URL)  # which come before `by_hand.keep`
WITH_URL = "with_url"  # rows of metadata that say where an image comes from
# Where fields with addresses are looked for, if none is known.
_ASKED_FILES, _ASKED_ROWS, _NAMED = 4, 1_000, 3
_ADDRESS = re.compile(r"(?i)(https?:)?//[^\s/]+\.[^\s/]+")


@dataclass(frozen=True)
class Piece:
    """One file of one table."""

    key: str
    table: Table
    file: File


def run(context: Context[FilterSpec, FilterRuntime]) -> Outcome:
    masks = context.runtime.masks
    images = context.inputs["images"].tables["images"]
    scored, told = context.inputs.get("scores"), context.inputs.get("metadata")
    pieces = [
        *_pieces("images", images, context.spec),
        *_pieces("scores", scored.tables["scores"] if scored else (), context.spec),
        *_pieces("metadata", told.tables["metadata"] if told else (), context.spec),
    ]
    judge = functools.partial(_judged, context.store, masks)
    make = functools.partial(map_items, judge, cpus=context.cpus, address=context.ray_address, seconds=_seconds)
    parts, new = made(context, STAGE, [(piece.key, piece, piece.file.rows) for piece in pieces], make)
    lists = context.runtime.lists
    mask = _mask(context.store, parts, listed.reasons(masks), lists, images)
    file, named = mask.files["filtered"], mask.files.get(BY_HAND)
    taken = sum(f.rows for f in images)
    asked = any("url" in mask.columns for mask in listed.reading("metadata", masks))
    with_url = sum(part.counts.get(WITH_URL, 0) for part in parts) if asked else None
    metadata = told.tables["metadata"] if told else ()
    warnings = [without_urls(context.store, metadata, taken)] if with_url == 0 else []
    if named is not None:
        warnings += told_of(context.store, lists, named, file)
    return Outcome(
        tables={"filtered": (file,) if file.rows else (), **({BY_HAND: (named,)} if named else {})},
        rows=Rows(taken=taken, kept=taken - file.rows, dropped=mask.counts),
        details=FilterDetails(
            parts=len(parts),
            parts_made=len(new),
            with_url=with_url,
            warnings=warnings or None,
        ),
    )


def without_urls(store: Store, metadata: Sequence[File], images: int) -> str:
    """What to tell where a blocklist had nothing to compare with, and which fields hold addresses under another name."""
    found: dict[str, str] = {}
    for file in metadata[:_ASKED_FILES]:
        table = store.table([file], ["extra"], records.METADATA).slice(0, _ASKED_ROWS)
        for extra in table["extra"].drop_null().to_pylist():
            for name, value in json.loads(extra).items():
                if isinstance(value, str) and _ADDRESS.match(value):
                    found.setdefault(name, value)
    named = (
        f"; addresses lie in {', '.join(sorted(found)[:_NAMED])}: call that field `url` in the source" if found else ""
    )
    return (
        f"nothing could be blocked: blocked_domains and blocked_urls go by the URL of an image, and none of the {images:,} images has one"
        f"{shown(named)}"
    )


def _pieces(table: Table, files: Sequence[File], spec: FilterSpec) -> list[Piece]:
    """A part's key is the digest of its file and of the thresholds that are compared with that table."""
    used = {mask.knob: spec.thresholds[mask.knob] for mask in listed.reading(table, spec.thresholds)}
    return [Piece(digest(STAGE, VERSION, table, file.sha256, used), table, file) for file in files]


def _judged(store: Store, masks: Mapping[str, Any], piece: Piece) -> Part:
    started = time.perf_counter()
    reading = listed.reading(piece.table, masks)
    columns = _SCORES if piece.table == "scores" else {"image_id", *(name for mask in reading for name in mask.columns)}
    table = store.table([piece.file], sorted(columns))
    counts = {"rows": piece.file.rows}
    if "url" in columns:
        counts[WITH_URL] = piece.file.rows - table["url"].null_count
    if piece.table == "scores":
        found = judged_scores(table, listed.sides(listed.identity(masks)))
    else:
        dropped = [mask.judge(table, masks[mask.knob]) for mask in reading if mask.judge is not None]
        found = pa.concat_tables([records.FILTERED.empty_table(), *dropped])
    return store.commit_part(STAGE, piece.key, {"failing": found}, counts, time.perf_counter() - started)


_SCORES = frozenset(("image_id", "filter", "score"))


def judged_scores(scores: pa.Table, sides: Mapping[str, Side]) -> pa.Table:
    """`filtered` rows of the scores on the wrong side of their filter's threshold."""
    dropped = [records.FILTERED.empty_table()]
    for name in pc.unique(scores["filter"]).to_pylist():
        own = scores.filter(pc.equal(scores["filter"], name))
        values = own["score"].to_numpy().astype(np.float64)
        threshold, keep = sides[name]
        bad = values < threshold if keep == "above" else values >= threshold
        dropped.append(failing(own, name, values, bad, threshold))
    return pa.concat_tables(dropped)


def _seconds(piece: Piece) -> float:
    return piece.file.rows * 1e-5


def _mask(store: Store, parts: Sequence[Part], reasons: Sequence[str], lists: Lists, images: Sequence[File]) -> Part:
    """The first reason of each image, by image_id, and which images lists by hand name. Holds what fails a filter in memory, about
    60 bytes a row."""
    by_list = [(one.key, one.name, identity_of([one])) for one in lists.all]
    key = digest(STAGE, VERSION, "mask", [part.key for part in parts], list(reasons), *([by_list] if by_list else []))
    done = store.part(STAGE, key)
    if done is not None:
        return done
    started = time.perf_counter()
    failing = store.table([part.files["failing"] for part in parts], None, records.FILTERED)
    tables = {}
    if by_list:
        tables[BY_HAND] = named = named_by_hand(lists, _pool(store, images, lists))
        failing, reasons = decided_by_hand(failing, named), [BY_HAND, *reasons]
    table = first_reasons(failing, reasons)
    counted = {r["values"]: r["counts"] for r in pc.value_counts(table["reason"]).to_pylist()}
    counts = {reason: counted[reason] for reason in reasons if reason in counted}
    return store.commit_part(STAGE, key, {"filtered": table, **tables}, counts, time.perf_counter() - started)


def _pool(store: Store, images: Sequence[File], lists: Lists) -> pa.Array:
    """The listed images that the pool holds."""
    wanted = pa.array(union(lists.all), pa.string())
    columns = [store.table([file], ["image_id"])["image_id"] for file in images]
    found = [column.filter(pc.is_in(column, wanted)) for column in columns]
    return pa.chunked_array([chunk for column in found for chunk in column.chunks], pa.string()).combine_chunks()


def named_by_hand(lists: Lists, pool: pa.Array) -> pa.Table:
    """`by_hand`: the images of the pool that each list names, sorted."""
    tables = [records.BY_HAND.empty_table()]
    for action, of in (("drop", lists.drop), ("keep", lists.keep)):
        for one in of:
            ids = pa.array(one.ids, pa.string())
            ids = ids.filter(pc.is_in(ids, pool))
            columns = [ids, pa.repeat(action, len(ids)), pa.repeat(one.name, len(ids))]
            tables.append(pa.table(columns, schema=records.BY_HAND))
    order = [(name, "ascending") for name in records.BY_HAND.names]
    rows = pa.concat_tables(tables).sort_by(order)
    return rows.group_by(rows.column_names, use_threads=False).aggregate([])  # two lists of one name may share images


def decided_by_hand(failing: pa.Table, named: pa.Table) -> pa.Table:
    """`filtered` rows with those of images to drop, and without those of images to keep, except where their URL is blocked."""
    of = {action: pc.unique(named["image_id"].filter(pc.equal(named["action"], action))) for action in ("drop", "keep")}
    blocked = pc.is_in(failing["reason"], pa.array(BLOCKED))
    stays = pc.or_(blocked, pc.invert(pc.is_in(failing["image_id"], of["keep"])))
    count = len(of["drop"])
    unknown = pa.nulls(count, pa.float64())
    dropped = pa.table([of["drop"], pa.repeat(BY_HAND, count), unknown, unknown], schema=records.FILTERED)
    return pa.concat_tables([failing.filter(stays), dropped])


def told_of(store: Store, lists: Lists, named: File, filtered: File) -> list[str]:
    """What to tell of lists by hand: lists without ids, ids that the pool does not hold, images that cannot be kept."""
    rows = store.table([named], None, records.BY_HAND)
    pool = set(rows["image_id"].to_pylist())
    taken_down = forgotten(store)
    found = []
    for one in lists.all:
        if not one.ids:
            found.append(f"{one.key}: the list {one.name} holds no image_ids, so it changes nothing")
            continue
        missing = [image_id for image_id in one.ids if image_id not in pool]
        gone = sum(image_id in taken_down for image_id in missing)
        if missing:
            why = f" ({gone:,} of them were taken out by `lodeset forget`)" if gone else ""
            found.append(
                f"{one.key}: {len(missing):,} of the {len(one.ids):,} image_ids of {one.name} are not in the pool{why}"
            )
    failed = store.table([filtered], ["image_id", "reason"], records.FILTERED)
    wanted = pc.unique(rows["image_id"].filter(pc.equal(rows["action"], "keep")))
    blocked = pc.and_(pc.is_in(failed["image_id"], wanted), pc.is_in(failed["reason"], pa.array(BLOCKED)))
    count = pc.sum(blocked).as_py() or 0
    if count:
        found.append(
            f"{count:,} images of by_hand.keep come from blocked hosts or URLs, and were dropped all the same: take them out of "
            "filter.blocked_domains or filter.blocked_urls to keep them"
        )
    return found


def first_reasons(failing: pa.Table, reasons: Sequence[str]) -> pa.Table:
    """`filtered` rows -> for each image the one whose reason comes first in `reasons`, sorted by image_id."""
    rank = pc.index_in(failing["reason"], pa.array(reasons, pa.string()))
    ordered = failing.append_column("rank", rank).sort_by([("image_id", "ascending"), ("rank", "ascending")])
    rows = ordered.append_column("row", pa.array(np.arange(ordered.num_rows)))
    first = rows.group_by("image_id").aggregate([("row", "min")])["row_min"]
    return ordered.take(np.sort(first.to_numpy())).drop_columns(["rank"])
