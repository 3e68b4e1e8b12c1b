"""calibrate (Ray Data): how similar an embedder finds copies and strangers -> thresholds, frozen.

A seeded sample of the pool is copied in the ways of `algorithms.copies.kinds`; each copy is embedded and compared with its
original. Each sampled image is also compared with the whole pool: its most similar image that is no copy by its thumbnail
is its nearest stranger.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from lodeset.pipeline.algorithms.copies import kinds as copies
from lodeset.pipeline.algorithms.copies import thresholds, verify
from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pipeline.algorithms.neighbors.exact import ExactIndex
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows
from lodeset.pipeline.embedders.make import load, runs_on_gpu
from lodeset.pipeline.engines.ray import cores, map_with_state
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.specs import CalibrateSpec, EmbedderRuntime
from lodeset.pipeline.stages.dedup.universe import thumbnails_of
from lodeset.pipeline.stages.embed import Embedder, embedder_of
from lodeset.pipeline.stages.fit_embedder import seeded_sample
from lodeset.pipeline.tables.vectors import normalised, read_vectors

VERSION = CalibrateSpec.VERSION
STAGE = "calibrate"
PARTS = 8
SAMPLES = pa.schema([("image_id", pa.string()), ("kind", pa.string()), ("similarity", pa.float32())])
STRANGER = "stranger"


@dataclass(frozen=True)
class Pool:
    """What the sampled images are compared with."""

    vectors: tuple[File, ...]
    images: tuple[File, ...]


@dataclass(frozen=True)
class Chunk:
    key: str
    places: tuple[Location, ...]


def run(context: Context[CalibrateSpec, EmbedderRuntime]) -> Outcome:
    ingested, embedded = context.inputs["images"], context.inputs["vectors"]
    embedder = embedder_of(context)
    wanted = context.spec.calibration_images
    sample = seeded_sample(context.store, ingested, wanted, seed=1)
    if len(sample) < 2:
        raise LodesetError(
            f"a pool of {len(sample)} images cannot calibrate dedup: set dedup.threshold and dedup.reference_threshold"
        )
    chunks = [tuple(sample[i::PARTS]) for i in range(PARTS) if sample[i::PARTS]]
    keys = [digest(STAGE, VERSION, context.fingerprint, i) for i in range(len(chunks))]
    work = [(key, Chunk(key, places), len(places)) for key, places in zip(keys, chunks, strict=True)]
    pool = Pool(embedded.tables["vectors"], ingested.tables["images"])
    make = functools.partial(
        map_with_state,
        functools.partial(_worker, embedder, pool),
        cpus=context.cpus,
        address=context.ray_address,
        gpu=runs_on_gpu(embedder.config),
        seconds=lambda chunk: 0.1 * len(chunk.places),
    )
    parts, new = made(context, STAGE, work, make)
    files = tuple(p.files["samples"] for p in parts)
    return Outcome(
        tables={"samples": files},
        rows=_rows(ingested, len(sample)),
        details={"parts": len(parts), "parts_made": len(new), **summary(context.store.table(files))},
    )


def _rows(ingested: Artifact, sampled: int) -> Rows:
    left = ingested.rows.kept - sampled
    return Rows(taken=ingested.rows.kept, kept=sampled, dropped={"not_sampled": left} if left else {})


def summary(samples: pa.Table) -> dict[str, object]:
    """The thresholds for both ways of deciding, and the median similarity of each kind of copy."""
    kinds = np.asarray(samples["kind"].to_pylist())
    similarity = samples["similarity"].to_numpy()
    stranger = kinds == STRANGER
    found = [kind for kind in (*copies.KINDS, STRANGER) if (kinds == kind).any()]
    return {
        "candidates": asdict(thresholds.candidates(similarity[~stranger])),
        "unverified": asdict(thresholds.unverified(similarity[stranger])) if stranger.any() else None,
        "median_similarity": {kind: round(float(np.median(similarity[kinds == kind])), 4) for kind in found},
    }


def _worker(embedder: Embedder, pool: Pool) -> Callable[[Chunk], Part]:
    store = embedder.store
    embed = load(embedder.config, embedder.fitted, store, threads=cores())
    ids, vectors = read_vectors(store, pool.vectors)
    index = ExactIndex(vectors)
    row_of = {image_id: row for row, image_id in enumerate(ids)}
    thumbnails = thumbnails_of(store, pool.images, ids)

    def calibrate(chunk: Chunk) -> Part:
        started = time.perf_counter()
        rows: list[tuple[str, str, float]] = []
        # Embed drops images whose vectors are not finite.
        known = tuple(place for place in chunk.places if place.image_id in row_of)
        found_near = index.search(vectors[[row_of[place.image_id] for place in known]], min(len(ids), 65))
        near = {place.image_id: n for n, place in enumerate(known)}
        for place, data in read_images(known):
            rng = np.random.default_rng(int(place.image_id[:15], 16))
            image = decode(data, embedder.max_pixels)
            row = row_of[place.image_id]
            found = normalised(embed([copies.copy_of(image, kind, rng) for kind in copies.KINDS])).astype(np.float32)
            similarity = found @ vectors[row].astype(np.float32)
            rows += [(place.image_id, kind, float(s)) for kind, s in zip(copies.KINDS, similarity, strict=True)]
            nearest, others = (column[near[place.image_id]] for column in found_near)
            alike, _ = verify.agreement(thumbnails, np.full(len(others), row), others)
            strange = (alike < verify.AGREE_REFERENCE) & (others != row)
            if strange.any():
                rows.append((place.image_id, STRANGER, float(nearest[strange][0])))
        table = pa.Table.from_pylist([dict(zip(SAMPLES.names, r, strict=True)) for r in rows], schema=SAMPLES)
        return store.commit_part(
            STAGE, chunk.key, {"samples": table}, {"images": len(chunk.places)}, time.perf_counter() - started
        )

    return calibrate
