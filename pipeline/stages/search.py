"""What dedup and retrieval share: the vectors that are searched, laid out once in the store, and the index over them.

The first step of a search writes one part: `vectors.npy`, fp16 [N, D] in the order of the image_ids, and for an approximate
search `index.faiss`. Workers map the vectors into memory (from an object store they read them), so that all workers of a
machine share one copy.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.neighbors import approximate
from lodeset.pipeline.algorithms.neighbors.approximate import ApproximateIndex, Asked, Kind, Plan
from lodeset.pipeline.algorithms.neighbors.exact import ExactIndex
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables.vectors import read_vectors

VERSION = 1
STAGE = "neighbors"
COPIED = 64 * 2**20  # bytes at once


@dataclass(frozen=True)
class Base:
    """What is searched, as it lies in the store."""

    kind: Kind
    vectors: File
    index: File | None


class Rows(Protocol):
    """A range of rows to search for."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


def chosen(
    context: Context, files: Mapping[str, Sequence[File]], queries: int, vectors: int, k: int, asked: Asked
) -> Plan:
    """How to search, by the numbers of queries and vectors; `files` are `vectors` tables by the name of their set.

    Raises:
        LodesetError: two sets were embedded at different widths.
    """
    return approximate.plan(queries, vectors, _width(context.store, files), k, asked, context.cpus)


def space(vectors: Artifact) -> str:
    """What makes vectors comparable: the embedder, and what was fitted for it."""
    return digest(vectors.stage, vectors.config, vectors.inputs.get("fitted", {}).get("identity"))


def seconds(base: int, rows: Rows) -> float:
    """Roughly how long a core searches for some rows among so many vectors."""
    return 0.2 + (rows.stop - rows.start) * (1e-4 + 2e-7 * base)


def prepared(
    context: Context, plan: Plan, files: Mapping[str, Sequence[File]], ids: Sequence[str | None], basis: str
) -> Base:
    """The vectors of these image_ids, in their order, and their index, committed once under a key of `basis`.

    Says first what the search will take.
    """
    print(plan, file=sys.stderr, flush=True)
    store, key = context.store, digest(STAGE, VERSION, basis, plan.kind)
    part = store.part(STAGE, key)
    if part is None:
        started, folder, attempt = time.perf_counter(), f"parts/{STAGE}/{key}", uuid.uuid4().hex[:12]
        # Beside the store, where there is room for vectors; elsewhere only if the store is.
        near = store.path(f"parts/{STAGE}") if store.local else None
        if near:
            os.makedirs(near, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=near) as scratch:
            path = Path(scratch) / "vectors.npy"
            vectors = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.float16, shape=(len(ids), plan.dimensions), version=(1, 0)
            )
            lay_out(store, files, ids, vectors)
            vectors.flush()
            written = {"vectors": _copied(store, path, f"{folder}/{attempt}-vectors.npy", len(ids))}
            if plan.kind != "exact":
                built = approximate.build(vectors, plan.kind, context.cpus)
                relative = f"{folder}/{attempt}-index.faiss"
                with store.writing(relative) as sink:
                    approximate.write(built, sink.write)
                written["index"] = File(relative, len(ids), sink.size_bytes, sink.sha256())
        part = store.commit_part(STAGE, key, {}, {"images": len(ids)}, time.perf_counter() - started, files=written)
    return Base(plan.kind, part.files["vectors"], part.files.get("index"))


def opened(store: Store, base: Base) -> ExactIndex | ApproximateIndex:
    """The search itself, in one thread: a worker has one core."""
    if store.local:
        store.check(base.vectors)
        # Copy on write: nothing writes, but torch wants arrays that could be written to.
        vectors = np.asarray(np.load(store.path(base.vectors.path), mmap_mode="c"))
    else:
        with store.opened(base.vectors) as file:
            vectors = np.load(file, allow_pickle=False)
    if base.index is None:
        return ExactIndex(vectors)
    with store.opened(base.index) as file:
        return ApproximateIndex(approximate.read(file.read), vectors)


def lay_out(
    store: Store, files: Mapping[str, Sequence[File]], ids: Sequence[str | None], out: NDArray[np.float16]
) -> None:
    """Writes the vectors of these image_ids into the rows of `out` [N, D], file by file."""
    row_of = {image_id: row for row, image_id in enumerate(ids)}
    for one in files.values():
        for file in one:
            found, matrix = read_vectors(store, [file])
            rows = np.fromiter((row_of.get(i, -1) for i in found), np.int64, len(found))
            out[rows[rows >= 0]] = matrix[rows >= 0]


def _width(store: Store, files: Mapping[str, Sequence[File]]) -> int:
    first, width = "", 0
    for name, one in files.items():
        for file in one[:1]:
            with store.opened(file) as source:
                found = pq.read_schema(source).field("vector").type.list_size
            if width and found != width:
                raise LodesetError(
                    f"vectors of `{name}` have {found} dimensions, those of `{first}` {width}: embed both with one embedder"
                )
            first, width = first or name, found
    return width or 1


def _copied(store: Store, path: Path, relative: str, rows: int) -> File:
    with path.open("rb") as source, store.writing(relative) as sink:
        while piece := source.read(COPIED):
            sink.write(piece)
    return File(relative, rows, sink.size_bytes, sink.sha256())
