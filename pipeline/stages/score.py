"""score (Ray Data): `images` + `locations` -> `scores`, one number an image and pixel filter; one pass over the bytes for all.

A part is one filter's scores of one ingest part, keyed by its image_ids and by what the filter computes (a model's bytes,
not its threshold). So another threshold makes no part, another classifier reads the bytes once for its own scores alone,
and data that moved is not read again. When an ingest part changed (images were added to a folder), the scores that its
predecessor held are taken over row by row.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.compute as pc

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome, read_as
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.filters import Floats, Measure
from lodeset.pipeline.filters.masks import scorers
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.specs import ScoreRuntime, ScoreSpec
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.images import image_ids, places_of

VERSION = ScoreSpec.VERSION
STAGE = "score"
AT_ONCE = 64  # images whose network inputs wait for one call; decoded images never wait


@dataclass(frozen=True)
class Piece:
    """The scores of one ingest part to make: part key -> filter. `known` are files in which some of them may be, by filter."""

    images: File
    locations: File
    wanted: Mapping[str, str]
    known: Mapping[str, tuple[File, ...]]


@dataclass(frozen=True)
class Work:
    """What a worker needs besides."""

    store: Store
    masks: Mapping[str, Any]
    max_pixels: int


def run(context: Context[ScoreSpec, ScoreRuntime]) -> Outcome:
    store, ingested = context.store, context.inputs["images"]
    wanted = context.spec.scorers
    pairs = list(zip(ingested.tables["images"], ingested.tables["locations"], strict=True))
    holds = [digest(image_ids(store, images)) for images, _ in pairs]
    keys = {name: [digest(STAGE, VERSION, ids, name, what) for ids in holds] for name, what in wanted.items()}
    work = [
        (key, (key, name, at), pairs[at][0].rows) for name, of_name in keys.items() for at, key in enumerate(of_name)
    ]
    known = _known(context.previous, wanted, {key for key, _, _ in work})

    def make(items: Iterable[tuple[str, str, int]]) -> Iterator[Part]:
        """All filters that an ingest part still lacks are one item of work: its bytes are read once."""
        lacking: dict[int, dict[str, str]] = {}
        for key, name, at in items:
            lacking.setdefault(at, {})[key] = name
        pieces = [Piece(*pairs[at], wanted, known) for at, wanted in sorted(lacking.items())]
        seconds = functools.partial(_seconds, context.stage.seconds_per_image)
        worker = functools.partial(_worker, Work(store, context.runtime.masks, context.runtime.max_pixels))
        for parts in map_with_state(worker, pieces, cpus=context.cpus, address=context.ray_address, seconds=seconds):
            yield from parts

    parts, new = made(context, STAGE, work, make)
    fresh = [part for part in parts if part.key in new]
    images = sum(file.rows for file, _ in pairs)
    return Outcome(
        tables={"scores": tuple(p.files["scores"] for p in parts if p.files["scores"].rows)},
        rows=Rows(taken=images, kept=images),
        details={
            "parts": len(parts),
            "parts_made": len(new),
            # The filters of one ingest part share a pass over its bytes: one of its parts counts what it read, and its time.
            "images_read": sum(part.counts["read"] for part in fresh),
            "score_seconds": round(sum(part.seconds for part in fresh), 3),
        },
    )


def _seconds(each: float, piece: Piece) -> float:
    return 2 * each * piece.images.rows


def _known(previous: Artifact | None, wanted: Mapping[str, object], current: set[str]) -> dict[str, tuple[File, ...]]:
    """For each filter that computes what it did in the run before: that run's files which are no longer parts as they stand."""
    if previous is None:
        return {}
    before = read_as(ScoreSpec, previous.config).scorers
    files = tuple(f for f in previous.tables["scores"] if f.path.split("/")[2] not in current)
    return {name: files for name, what in wanted.items() if digest(before.get(name)) == digest(what)}


def _worker(work: Work) -> Callable[[Piece], list[Part]]:
    """Called once in each worker; a network is loaded when the first part lacks its scores."""
    cv2.setNumThreads(1)
    by_name = scorers(work.masks)
    load = functools.cache(lambda name: by_name[name].measure())
    return functools.partial(_score_part, work, load)


def _score_part(work: Work, load: Callable[[str], Measure], piece: Piece) -> list[Part]:
    started, store = time.perf_counter(), work.store
    places = places_of(store, piece.images, piece.locations)
    found = {
        name: _taken_over(store, piece.known.get(name, ()), name, places["image_id"].combine_chunks())
        for name in piece.wanted.values()
    }
    lacking = [
        Location(row["image_id"], row["uri"], row["member"], row["offset"], row["size_bytes"])
        for row in places.to_pylist()
        if any(row["image_id"] not in scores for scores in found.values())
    ]
    waiting: dict[str, dict[str, Floats]] = {name: {} for name in found}

    def flush(most: int) -> None:
        for name, kept in waiting.items():
            if len(kept) > most:
                found[name] |= dict(zip(kept, map(float, load(name).scores(list(kept.values()))), strict=True))
                kept.clear()

    for place, data in read_images(lacking):
        image = decode(data, work.max_pixels)
        for name, kept in waiting.items():
            if place.image_id not in found[name]:
                kept[place.image_id] = load(name).prepare(image)
        flush(AT_ONCE - 1)
    flush(0)

    ids = image_ids(store, piece.images)
    parts: list[Part] = []
    for key, name in piece.wanted.items():
        table = score_table(ids, name, [found[name][image_id] for image_id in ids])
        counts = {"images": len(ids), "read": 0 if parts else len(lacking)}
        seconds = 0.0 if parts else time.perf_counter() - started
        parts.append(store.commit_part(STAGE, key, {"scores": table}, counts, seconds))
    return parts


def _taken_over(store: Store, known: Sequence[File], name: str, wanted: pa.Array) -> dict[str, float]:
    scores: dict[str, float] = {}
    for file in known:
        table = store.table([file])
        table = table.filter(pc.and_(pc.equal(table["filter"], name), pc.is_in(table["image_id"], wanted)))
        scores.update(zip(table["image_id"].to_pylist(), table["score"].to_pylist(), strict=True))
    return scores


def score_table(ids: Sequence[str], name: str, scores: Sequence[float]) -> pa.Table:
    """`scores` rows of one filter."""
    columns = [pa.array(ids, pa.string()), pa.array([name] * len(ids), pa.string()), pa.array(scores, pa.float32())]
    return pa.Table.from_arrays(columns, schema=records.SCORES)
