"""filter (Ray): `images`, `scores`, `metadata` -> `filtered`, the pool images that are masked out before dedup, each with
its reason: the first filter that it fails.

Each filter reads the one table that it needs, file by file; no image is read here. Reference sets are not filtered, so that
a small or blurred reference image still finds its copies, and neither are curated sets: somebody chose their images.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import File, Part, Rows, Store
from lodeset.pipeline.engines.ray import map_items
from lodeset.pipeline.filters.config import (
    BLANK,
    BLOCKED_DOMAIN,
    BLOCKED_URL,
    BLUR,
    MAX_ASPECT,
    MIN_SIDE,
    Filter,
    blank_below,
)
from lodeset.pipeline.shown import shown
from lodeset.pipeline.specs import FilterDetails, FilterRuntime, FilterSpec
from lodeset.pipeline.tables import records

VERSION = FilterSpec.VERSION
STAGE = "filter"
WITH_URL = "with_url"  # rows of metadata that say where an image comes from
# Where fields with addresses are looked for, if none is known.
_ASKED_FILES, _ASKED_ROWS, _NAMED = 4, 1_000, 3
_ADDRESS = re.compile(r"(?i)(https?:)?//[^\s/]+\.[^\s/]+")

Table = Literal["images", "scores", "metadata"]


@dataclass(frozen=True)
class Piece:
    """One file of one table."""

    key: str
    table: Table
    file: File


def run(context: Context[FilterSpec, FilterRuntime]) -> Outcome:
    masks = context.runtime
    images = context.inputs["images"].tables["images"]
    scored, told = context.inputs.get("scores"), context.inputs.get("metadata")
    pieces = [
        *_pieces("images", images, context.spec),
        *_pieces("scores", scored.tables["scores"] if scored else (), context.spec),
        *_pieces("metadata", told.tables["metadata"] if told else (), context.spec),
    ]
    judge = functools.partial(_judged, context.store, masks)
    make = functools.partial(map_items, judge, cpus=context.cpus, address=context.ray_address)
    parts, new = made(context, STAGE, [(piece.key, piece, piece.file.rows) for piece in pieces], make)
    mask = _mask(context.store, parts, order(masks.config))
    file = mask.files["filtered"]
    taken = sum(f.rows for f in images)
    with_url = sum(part.counts.get(WITH_URL, 0) for part in parts) if masks.lists else None
    metadata = told.tables["metadata"] if told else ()
    return Outcome(
        tables={"filtered": (file,) if file.rows else ()},
        rows=Rows(taken=taken, kept=taken - file.rows, dropped=mask.counts),
        details=FilterDetails(
            parts=len(parts),
            parts_made=len(new),
            with_url=with_url,
            warnings=[without_urls(context.store, metadata, taken)] if with_url == 0 else None,
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


def order(config: Filter) -> list[str]:
    """Every reason, in the order in which they count."""
    return [MIN_SIDE, MAX_ASPECT, BLANK, BLUR, *(one.name for one in config.classifiers), BLOCKED_DOMAIN, BLOCKED_URL]


_READ_BY: dict[str, tuple[str, ...]] = {
    "images": ("min_side", "max_aspect", "blank"),
    "scores": ("min_sharpness", "classifiers"),
    "metadata": ("blocked_domains", "blocked_urls"),
}


def _pieces(table: Table, files: Sequence[File], spec: FilterSpec) -> list[Piece]:
    """A part's key is the digest of its file and of the thresholds that are compared with that table."""
    thresholds = {knob: getattr(spec, knob) for knob in _READ_BY[table]}
    used = {knob: value for knob, value in thresholds.items() if value is not None}
    return [Piece(digest(STAGE, VERSION, table, file.sha256, used), table, file) for file in files]


def _judged(store: Store, masks: FilterRuntime, piece: Piece) -> Part:
    started = time.time()
    judge: Callable[[pa.Table, FilterRuntime], pa.Table] = _JUDGES[piece.table]
    columns = [c for c in _COLUMNS[piece.table] if c != "thumbnail" or masks.config.blank is not False]
    table = store.table([piece.file], columns)
    counts = {"rows": piece.file.rows}
    if piece.table == "metadata":
        counts[WITH_URL] = piece.file.rows - table["url"].null_count
    return store.commit_part(STAGE, piece.key, {"failing": judge(table, masks)}, counts, time.time() - started)


def judged_images(images: pa.Table, masks: FilterRuntime) -> pa.Table:
    """`filtered` rows of the images (image_id, width, height, and thumbnail if `blank` is set) that are too small, too long
    or blank: one for each filter that an image fails."""
    config = masks.config
    ids = images["image_id"].to_numpy(zero_copy_only=False)
    width, height = (images[side].to_numpy().astype(np.float64) for side in ("width", "height"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    failing = [_rows(ids, MIN_SIDE, shorter, shorter < config.min_side, config.min_side)]
    if config.max_aspect is not None:
        aspect = longer / shorter
        failing.append(_rows(ids, MAX_ASPECT, aspect, aspect > config.max_aspect, config.max_aspect))
    if config.blank is not False:
        deviation = np.array([np.frombuffer(t, np.uint8).std() for t in images["thumbnail"].to_pylist()], np.float64)
        failing.append(_rows(ids, BLANK, deviation, deviation < blank_below(config), blank_below(config)))
    return pa.concat_tables(failing)


def judged_scores(scores: pa.Table, masks: FilterRuntime) -> pa.Table:
    """`filtered` rows of the scores on the wrong side of their filter's threshold."""
    failing = [records.FILTERED.empty_table()]
    for name in pc.unique(scores["filter"]).to_pylist():
        own = scores.filter(pc.equal(scores["filter"], name))
        ids, values = own["image_id"].to_numpy(zero_copy_only=False), own["score"].to_numpy().astype(np.float64)
        threshold, above = _kept_side(masks.config, name)
        bad = values < threshold if above else values >= threshold
        failing.append(_rows(ids, name, values, bad, threshold))
    return pa.concat_tables(failing)


def _kept_side(config: Filter, name: str) -> tuple[float, bool]:
    """A pixel filter's threshold, and whether it keeps what is above."""
    if name == BLUR:
        assert config.min_sharpness is not None, "blur is scored where min_sharpness is set"
        return config.min_sharpness, True
    one = next(one for one in config.classifiers if one.name == name)
    return one.threshold, one.keep == "above"


def judged_urls(metadata: pa.Table, masks: FilterRuntime) -> pa.Table:
    """`filtered` rows of the images of which any URL is blocked: an image found in two places has two."""
    reason = masks.lists.judge()
    rows: dict[tuple[str, str], None] = {}
    for image_id, url in zip(metadata["image_id"].to_pylist(), metadata["url"].to_pylist(), strict=True):
        if url and (why := reason(url)) is not None:
            rows[image_id, why] = None
    return pa.Table.from_pylist([{"image_id": i, "reason": why} for i, why in rows], schema=records.FILTERED)


_JUDGES = {"images": judged_images, "scores": judged_scores, "metadata": judged_urls}
_COLUMNS = {
    "images": ("image_id", "width", "height", "thumbnail"),
    "scores": ("image_id", "filter", "score"),
    "metadata": ("image_id", "url"),
}


def _rows(ids: Any, reason: str, values: Any, bad: Any, threshold: float) -> pa.Table:
    chosen = int(bad.sum())
    return pa.Table.from_arrays(
        [
            pa.array(ids[bad], pa.string()),
            pa.array([reason] * chosen, pa.string()),
            pa.array(values[bad], pa.float64()),
            pa.array([threshold] * chosen, pa.float64()),
        ],
        schema=records.FILTERED,
    )


def _mask(store: Store, parts: Sequence[Part], reasons: Sequence[str]) -> Part:
    """The first reason of each image, by image_id. Holds what fails a filter in memory, about 60 bytes a row."""
    key = digest(STAGE, VERSION, "mask", [part.key for part in parts], list(reasons))
    done = store.part(STAGE, key)
    if done is not None:
        return done
    started = time.time()
    table = first_reasons(store.table([part.files["failing"] for part in parts], None, records.FILTERED), reasons)
    counted = {r["values"]: r["counts"] for r in pc.value_counts(table["reason"]).to_pylist()}
    counts = {reason: counted[reason] for reason in reasons if reason in counted}
    return store.commit_part(STAGE, key, {"filtered": table}, counts, time.time() - started)


def first_reasons(failing: pa.Table, reasons: Sequence[str]) -> pa.Table:
    """`filtered` rows -> for each image the one whose reason comes first in `reasons`, sorted by image_id."""
    rank = pc.index_in(failing["reason"], pa.array(reasons, pa.string()))
    ordered = failing.append_column("rank", rank).sort_by([("image_id", "ascending"), ("rank", "ascending")])
    rows = ordered.append_column("row", pa.array(np.arange(ordered.num_rows)))
    first = rows.group_by("image_id").aggregate([("row", "min")])["row_min"]
    return ordered.take(np.sort(first.to_numpy())).drop_columns(["rank"])
