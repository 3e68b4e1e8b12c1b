"""embed (Ray Data): `images` + `locations` -> `vectors`. One ingest part is one embed part, read in the order of its bytes.

A part's key is the digest of its image_ids and of the embedder, so data that moved is not embedded again. When an ingest
part changed (images were added to a folder), the vectors that its predecessor held are taken over row by row.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import records
from pipeline.algorithms.images import decode
from pipeline.config import PrecomputedEmbedder
from pipeline.dag.fingerprint import canonical, digest
from pipeline.dag.stage import Context, Outcome
from pipeline.dag.store import Artifact, File, Part, Rows, Store
from pipeline.embedders import Embed
from pipeline.embedders.make import AnyEmbedder, load
from pipeline.embedders.precomputed import look_up
from pipeline.engines.ray import map_with_state
from pipeline.errors import LodesetError
from pipeline.sources.reading import Location, read_images
from pipeline.stages.parts import made

VERSION = 1
STAGE = "embed"


@dataclass(frozen=True)
class Embedder:
    """What a worker needs to make its embedding function."""

    store: Store
    config: AnyEmbedder
    fitted: File | None
    max_pixels: int


@dataclass(frozen=True)
class Piece:
    """One part to make. `known` are files of vectors by the same embedder in which some of its images may be."""

    key: str
    images: File
    locations: File
    known: tuple[File, ...]


def run(context: Context) -> Outcome:
    ingested = context.inputs["images"]
    fitted = context.inputs.get("fitted")
    embedder = Embedder(
        context.store,
        context.speed["embedder"],
        fitted.tables["dictionary"][0] if fitted else None,
        context.speed["max_pixels"],
    )
    identity = (context.config["embedder"], fitted.fingerprint if fitted else "")
    pairs = list(zip(ingested.tables["images"], ingested.tables["locations"], strict=True))
    keys = [digest(STAGE, VERSION, image_ids(context.store, images), *identity) for images, _ in pairs]
    known = _known(context.previous, context, keys)
    work = [(key, Piece(key, *pair, known), pair[0].rows) for key, pair in zip(keys, pairs, strict=True)]
    run_parts = functools.partial(
        map_with_state, functools.partial(_worker, embedder), cpus=context.cpus, address=context.ray_address
    )
    parts, new = made(context, STAGE, work, run_parts)
    return _outcome(parts, new)


def image_ids(store: Store, images: File) -> list[str]:
    """The images of an ingest part, in its order."""
    return list(store.table([images], ["image_id"]).column(0).to_pylist())


def _known(previous: Artifact | None, context: Context, keys: Sequence[str]) -> tuple[File, ...]:
    """Vector files of the run before that are no longer parts as they stand, if the embedder is still the same."""
    if previous is None or previous.config != canonical(context.config) or (
        previous.inputs.get("fitted", {}).get("fingerprint") != (context.inputs["fitted"].fingerprint if "fitted" in context.inputs else None)
    ):  # fmt: skip
        return ()
    current = set(keys)
    return tuple(f for f in previous.tables["vectors"] if f.path.split("/")[2] not in current)


def _worker(embedder: Embedder) -> Callable[[Piece], Part]:
    """Called once in each worker: loads the model, returns what makes one part."""
    store = embedder.store
    if isinstance(embedder.config, PrecomputedEmbedder):
        return functools.partial(_look_up_part, store, embedder.config)
    return functools.partial(_embed_part, store, load(embedder.config, embedder.fitted, store, threads=1), embedder)


def places_of(store: Store, images: File, locations: File) -> pa.Table:
    """One location for each image of an ingest part (its first), in the order of the bytes."""
    owned = store.table([images], ["image_id"])["image_id"]
    table = store.table([locations])
    table = table.filter(pc.is_in(table["image_id"], owned.combine_chunks()))
    first = (
        table.append_column("row", pa.array(np.arange(table.num_rows))).group_by("image_id").aggregate([("row", "min")])
    )
    return table.take(np.sort(first["row_min"].to_numpy()))


def _embed_part(store: Store, embed: Embed, embedder: Embedder, piece: Piece) -> Part:
    started = time.time()
    places = places_of(store, piece.images, piece.locations)
    ids = places["image_id"].to_pylist()
    rows = _taken_over(store, piece.known, set(ids))
    wanted = [
        Location(r["image_id"], r["uri"], r["member"], r["offset"], r["size_bytes"])
        for r in places.to_pylist()
        if r["image_id"] not in rows
    ]
    embedded = len(wanted)
    for batch in _batches(wanted, embedder):
        images = [decode(data, embedder.max_pixels) for _, data in batch]
        for (place, _), vector in zip(batch, embed(images), strict=True):
            rows[place.image_id] = normalised(vector)
    finite = [i for i in ids if np.isfinite(rows[i]).all()]
    counts = {"images": len(ids), "embedded": embedded, "not_finite": len(ids) - len(finite)}
    matrix = np.stack([rows[i] for i in finite]) if finite else np.zeros((0, 1), np.float16)
    return store.commit_part(STAGE, piece.key, {"vectors": vector_table(finite, matrix)}, counts, time.time() - started)


def _batches(wanted: Sequence[Location], embedder: Embedder) -> Iterator[list[tuple[Location, bytes]]]:
    size = getattr(embedder.config, "batch", 64)
    batch: list[tuple[Location, bytes]] = []
    for item in read_images(wanted):
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _taken_over(store: Store, known: Sequence[File], wanted: set[str]) -> dict[str, NDArray[np.float16]]:
    rows: dict[str, NDArray[np.float16]] = {}
    for file in known:
        ids = store.table([file], ["image_id"]).column(0).to_pylist()
        if wanted.isdisjoint(ids):
            continue
        found, matrix = read_vectors(store, [file])
        rows.update({i: matrix[n] for n, i in enumerate(found) if i in wanted})
    return rows


def _look_up_part(store: Store, config: PrecomputedEmbedder, piece: Piece) -> Part:
    started = time.time()
    places = places_of(store, piece.images, piece.locations)
    matrix, found = look_up(config, places.select(["image_id", "uri", "member"]))
    ids = places["image_id"].take(found).to_pylist()
    vectors = normalised(matrix)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
    kept = [i for i, good in zip(ids, finite, strict=True) if good]
    counts = {
        "images": places.num_rows,
        "embedded": 0,
        "not_finite": int((~finite).sum()),
        "no_vector": places.num_rows - len(ids),
    }
    return store.commit_part(
        STAGE, piece.key, {"vectors": vector_table(kept, vectors[finite])}, counts, time.time() - started
    )


def normalised(vectors: NDArray[np.float32]) -> NDArray[np.float16]:
    """L2-normalised in fp16; a zero vector stays zero (it is similar to nothing)."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float16)


def vector_table(ids: Sequence[str], vectors: NDArray[np.float16]) -> pa.Table:
    """`vectors` rows: image_id, fixed-size list of D 16-bit numbers."""
    dimensions = vectors.shape[1]
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), dimensions)
    return pa.Table.from_arrays([pa.array(ids, pa.string()), lists], schema=records.vectors(dimensions))


def read_vectors(store: Store, files: Sequence[File]) -> tuple[list[str], NDArray[np.float16]]:
    """image_ids and vectors [N, D] of `vectors` files, in their order.

    Raises:
        LodesetError: files of different widths (two embedders in one set).
    """
    ids: list[str] = []
    blocks: list[NDArray[np.float16]] = []
    for file in files:
        if not file.rows:
            continue
        table = store.table([file])
        lists = table["vector"].combine_chunks()
        blocks.append(lists.flatten().to_numpy().reshape(table.num_rows, -1))
        ids += table["image_id"].to_pylist()
    widths = sorted({b.shape[1] for b in blocks})
    if len(widths) > 1:
        raise LodesetError(f"vectors of widths {widths} in one set: one embedder gives one width")
    return ids, np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float16)


def _outcome(parts: Sequence[Part], new: set[str]) -> Outcome:
    reasons = {r: sum(p.counts.get(r, 0) for p in parts) for r in ("not_finite", "no_vector")}
    kept = sum(p.files["vectors"].rows for p in parts)
    return Outcome(
        # A part without a vector has no width, and would keep others from reading the table as one.
        tables={"vectors": tuple(p.files["vectors"] for p in parts if p.files["vectors"].rows)},
        rows=Rows(
            taken=sum(p.counts["images"] for p in parts), kept=kept, dropped={r: n for r, n in reasons.items() if n}
        ),
        details={
            "parts": len(parts),
            "parts_made": len(new),
            "images_embedded": sum(p.counts["embedded"] for p in parts if p.key in new),
            "embed_seconds": round(sum(p.seconds for p in parts if p.key in new), 3),
        },
    )
