"""embed (Ray Data): `images` + `locations` -> `vectors`. One ingest part is one embed part, read in the order of its bytes.

A part's key is the digest of its image_ids and of the embedder, so data that moved is not embedded again. When an ingest
part changed (images were added to a folder), the vectors that its predecessor held are taken over row by row.

Two embedders (`embed.semantic`, `embed.dedup`) are two stages with parts of their own. Where both are to run, the first makes
the second's parts in its own pass: every image is read and decoded once, and the second stage finds its parts made.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pipeline.dag.fingerprint import canonical, digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.embedders import Embed, Knobs
from lodeset.pipeline.embedders.config import PrecomputedEmbedder
from lodeset.pipeline.embedders.make import load, runs_on_gpu
from lodeset.pipeline.embedders.models import name_of
from lodeset.pipeline.embedders.precomputed import (
    NO_VECTOR,
    NULL,
    SEVERAL,
    ZERO,
    VectorFile,
    look_up,
    unmatched,
    vector_files,
)
from lodeset.pipeline.engines.ray import cores, map_with_state
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.specs import EmbedderRuntime, EmbedSpec
from lodeset.pipeline.tables.images import image_ids, places_of
from lodeset.pipeline.tables.vectors import normalised, read_vectors, vector_table

VERSION = EmbedSpec.VERSION
STAGE = "embed"
REASONS = ("not_finite", NO_VECTOR, NULL, ZERO, SEVERAL)
_AHEAD = 4  # images that each thread decodes ahead of the network


@dataclass(frozen=True)
class Embedder:
    """What a worker needs to make its embedding function."""

    store: Store
    config: Knobs
    fitted: File | None
    max_pixels: int


@dataclass(frozen=True)
class Wanted:
    """The part of one embedder (its number in the worker) that is to be made.

    `known` are files of vectors by the same embedder in which some of its images may be.
    """

    embedder: int
    key: str
    known: tuple[File, ...]


@dataclass(frozen=True)
class Piece:
    """One part to make, and those of other embedders that the same images are to give."""

    wanted: Wanted
    images: File
    locations: File
    also: tuple[Wanted, ...] = ()


def embedder_of(context: Context[Any, EmbedderRuntime]) -> Embedder:
    """The embedder of a stage that is given one (embed, calibrate)."""
    fitted = context.inputs.get("fitted")
    dictionary = fitted.tables["dictionary"][0] if fitted else None
    return Embedder(context.store, context.runtime.embedder, dictionary, context.runtime.max_pixels)


def run(context: Context[EmbedSpec, EmbedderRuntime]) -> Outcome:
    ingested = context.inputs["images"]
    pairs = list(zip(ingested.tables["images"], ingested.tables["locations"], strict=True))
    ids = [image_ids(context.store, images) for images, _ in pairs]
    embedders = [embedder_of(one) for one in (context, *context.also)]
    config = embedders[0].config
    # Vectors are found by places too: what has moved since is looked up again.
    held = [(one, places) for one, places in zip(ids, _places(context.store, pairs, config), strict=True)]
    own, *others = [_wanted(one, number, held) for number, one in enumerate((context, *context.also))]
    # What is listed first is committed first: parts of another embedder that are there are not made again.
    there = context.store.committed(STAGE, [w.key for row in others for w in row])
    also = [tuple(row[n] for row in others if row[n].key not in (*there, own[n].key)) for n in range(len(own))]
    work = [
        (mine.key, Piece(mine, *pair, also[n]), pair[0].rows)
        for n, (mine, pair) in enumerate(zip(own, pairs, strict=True))
    ]
    run_parts = functools.partial(
        map_with_state,
        functools.partial(_worker, embedders),
        cpus=context.cpus,
        address=context.ray_address,
        gpu=any(runs_on_gpu(one.config) for one in embedders),
        seconds=lambda piece: 2 * context.stage.seconds_per_image * piece.images.rows * len(embedders),
    )
    parts, new = made(context, STAGE, work, run_parts)
    useless = not any(part.files["vectors"].rows for part in parts)
    if useless and isinstance(config, PrecomputedEmbedder) and not context.runtime.may_find_nothing:
        raise LodesetError(_nothing(context, config, parts))
    outcome = _outcome(parts, new, name_of(config))
    beside = sum(len(also[n]) for n, wanted in enumerate(own) if wanted.key in new)
    return Outcome(outcome.tables, outcome.rows, details={**outcome.details, "parts_made_beside": beside})


def _places(store: Store, pairs: Sequence[tuple[File, File]], config: Knobs) -> list[tuple[str, ...]]:
    """What a part's key holds of where its images lie: nothing, unless vectors are looked up by it."""
    if not isinstance(config, PrecomputedEmbedder):
        return [()] * len(pairs)
    tables = (store.table([locations], ["image_id", "uri", "member"]) for _, locations in pairs)
    return [(digest([table[name].to_pylist() for name in table.column_names]),) for table in tables]


def _nothing(context: Context, config: PrecomputedEmbedder, parts: Sequence[Part]) -> str:
    """Why precomputed vectors are of no use to a set."""
    pairs = zip(context.inputs["images"].tables["images"], context.inputs["images"].tables["locations"], strict=True)
    first = next(places_of(context.store, *pair).slice(0, 1).to_pylist()[0] for pair in pairs if pair[0].rows)
    reasons = {r: sum(part.counts.get(r, 0) for part in parts) for r in REASONS}
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.items() if count)
    count = sum(part.counts["images"] for part in parts)
    why = f": {unmatched(config, vector_files(config), first)}" if reasons[NO_VECTOR] == count else ""
    return f"{config.path} has a usable vector for none of the {count} images of `{context.stage.set}` ({told}){why}"


def _wanted(context: Context, number: int, held: Sequence[tuple[Sequence[str], tuple[str, ...]]]) -> list[Wanted]:
    """One part of this stage for each list of image_ids, and what else of them its key must hold."""
    fitted = context.inputs.get("fitted")
    identity = (context.spec.embedder, fitted.fingerprint if fitted else "")
    keys = [digest(STAGE, VERSION, ids, *identity, *places) for ids, places in held]
    known = _known(context.previous, context, keys)
    return [Wanted(number, key, known) for key in keys]


def _known(previous: Artifact | None, context: Context, keys: Sequence[str]) -> tuple[File, ...]:
    """Vector files of the run before that are no longer parts as they stand, if the embedder is still the same."""
    if previous is None or previous.config != canonical(context.spec) or (
        previous.inputs.get("fitted", {}).get("fingerprint") != (context.inputs["fitted"].fingerprint if "fitted" in context.inputs else None)
    ):  # fmt: skip
        return ()
    current = set(keys)
    return tuple(f for f in previous.tables["vectors"] if f.path.split("/")[2] not in current)


def _worker(embedders: Sequence[Embedder]) -> Callable[[Piece], Part]:
    """Called once in each worker: returns what makes one part. A model is loaded when the first part needs it."""
    store, config, threads = embedders[0].store, embedders[0].config, cores()
    if isinstance(config, PrecomputedEmbedder):
        return functools.partial(_look_up_part, store, config, vector_files(config))

    @functools.cache
    def loaded(number: int) -> Embed:
        return load(embedders[number].config, embedders[number].fitted, store, threads)

    def part(piece: Piece) -> Part:
        fillings = [
            _Filling(wanted, loaded(wanted.embedder), embedders[wanted.embedder].config)
            for wanted in (*piece.also, piece.wanted)
        ]
        return _embed_part(store, fillings, embedders[0].max_pixels, threads, piece)

    return part


@dataclass
class _Filling:
    """A part while it is made. Batches are those that its embedder alone would get, whatever else is made beside it."""

    wanted: Wanted
    embed: Embed
    config: Knobs
    rows: dict[str, NDArray[np.float16]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    batch: list[tuple[str, Image.Image]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, image_id: str, image: Image.Image) -> None:
        if image_id in self.missing:
            self.batch.append((image_id, image))
            if len(self.batch) == getattr(self.config, "batch", 64):
                self.flush()

    def flush(self) -> None:
        if self.batch:
            started = time.perf_counter()
            vectors = normalised(self.embed([image for _, image in self.batch]))
            self.rows.update(zip([image_id for image_id, _ in self.batch], vectors, strict=True))
            self.batch = []
            self.seconds += time.perf_counter() - started

    def commit(self, store: Store, ids: Sequence[str], seconds: float) -> Part:
        widths = sorted({len(row) for row in self.rows.values()})
        if len(widths) > 1:
            raise LodesetError(f"{name_of(self.config)} gives vectors of widths {widths}: an embedder gives one width")
        finite = [i for i in ids if np.isfinite(self.rows[i]).all()]
        counts = {"images": len(ids), "embedded": len(self.missing), "not_finite": len(ids) - len(finite)}
        matrix = np.stack([self.rows[i] for i in finite]) if finite else np.zeros((0, 1), np.float16)
        if finite:
            counts["dimensions"] = matrix.shape[1]
        return store.commit_part(STAGE, self.wanted.key, {"vectors": vector_table(finite, matrix)}, counts, seconds)


def _embed_part(store: Store, fillings: Sequence[_Filling], max_pixels: int, threads: int, piece: Piece) -> Part:
    """Makes the piece's own part, which is the last of the fillings, and before it those beside it."""
    started = time.perf_counter()
    places = places_of(store, piece.images, piece.locations)
    ids = places["image_id"].to_pylist()
    for filling in fillings:
        filling.rows = _taken_over(store, filling.wanted.known, set(ids))
        filling.missing = set(ids) - set(filling.rows)
    needed = set().union(*(filling.missing for filling in fillings))
    locations = [
        Location(r["image_id"], r["uri"], r["member"], r["offset"], r["size_bytes"])
        for r in places.to_pylist()
        if r["image_id"] in needed
    ]
    for place, image in _decoded(read_images(locations), max_pixels, threads):
        for filling in fillings:
            filling.add(place.image_id, image)
    for filling in fillings:
        filling.flush()
    *others, own = fillings
    for other in others:
        other.commit(store, ids, other.seconds)
    return own.commit(store, ids, time.perf_counter() - started - sum(other.seconds for other in others))


def _decoded(
    encoded: Iterable[tuple[Location, bytes]], max_pixels: int, threads: int
) -> Iterator[tuple[Location, Image.Image]]:
    """The images in their order; with several threads these decode while the network is at work."""
    if threads == 1:
        for place, data in encoded:
            yield place, decode(data, max_pixels)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Location, Future[Image.Image]]] = deque()
        for place, data in encoded:
            waiting.append((place, pool.submit(decode, data, max_pixels)))
            if len(waiting) == _AHEAD * threads:
                first, image = waiting.popleft()
                yield first, image.result()
        for place, image in waiting:
            yield place, image.result()


def _taken_over(store: Store, known: Sequence[File], wanted: set[str]) -> dict[str, NDArray[np.float16]]:
    rows: dict[str, NDArray[np.float16]] = {}
    for file in known:
        ids = store.table([file], ["image_id"]).column(0).to_pylist()
        if wanted.isdisjoint(ids):
            continue
        found, matrix = read_vectors(store, [file])
        rows.update({i: matrix[n] for n, i in enumerate(found) if i in wanted})
    return rows


def _look_up_part(store: Store, config: PrecomputedEmbedder, files: Sequence[VectorFile], piece: Piece) -> Part:
    started = time.perf_counter()
    places = places_of(store, piece.images, piece.locations)
    found = look_up(config, files, places.select(["image_id", "uri", "member"]))
    ids = places["image_id"].take(found.rows).to_pylist()
    vectors = normalised(found.vectors)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
    kept = [i for i, good in zip(ids, finite, strict=True) if good]
    counts = {"images": places.num_rows, "embedded": 0, "not_finite": int((~finite).sum()), **found.without}
    if kept:
        counts["dimensions"] = vectors.shape[1]
    return store.commit_part(
        STAGE, piece.wanted.key, {"vectors": vector_table(kept, vectors[finite])}, counts, time.perf_counter() - started
    )


def _outcome(parts: Sequence[Part], new: set[str], name: str) -> Outcome:
    reasons = {r: sum(p.counts.get(r, 0) for p in parts) for r in REASONS}
    kept = sum(p.files["vectors"].rows for p in parts)
    widths = sorted({p.counts["dimensions"] for p in parts if "dimensions" in p.counts})
    if len(widths) > 1:
        raise LodesetError(f"{name} gave vectors of widths {widths}: an embedder gives one width")
    if reasons["not_finite"] and not kept:
        raise LodesetError(
            f"{name} gave no finite vector for any of {reasons['not_finite']} images: check its preprocessing, and with "
            "16 bits (`dtype: fp16`, or auto on a GPU) try bf16 or fp32"
        )
    return Outcome(
        # A part without a vector has no width, and would keep others from reading the table as one.
        tables={"vectors": tuple(p.files["vectors"] for p in parts if p.files["vectors"].rows)},
        rows=Rows(
            taken=sum(p.counts["images"] for p in parts), kept=kept, dropped={r: n for r, n in reasons.items() if n}
        ),
        details={
            "embedder": name,
            "parts": len(parts),
            "parts_made": len(new),
            "images_embedded": sum(p.counts["embedded"] for p in parts if p.key in new),
            "embed_seconds": round(sum(p.seconds for p in parts if p.key in new), 3),
        },
    )
