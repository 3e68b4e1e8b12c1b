"""Approximate nearest neighbors through FAISS, and the choice between exact and approximate search by size.

An index only proposes candidates, which are ranked by fp32 products of the vectors themselves, as in `exact`.

- IVF-PQ (Jégou, Douze and Schmid, PAMI 2011): sqrt(N) cells by spherical k-means of a seeded sample, residuals in 4-bit
  codes of 4 dimensions each (D/8 bytes per vector), scanned in registers (André, Kermarrec and Le Scouarnec, PAMI
  2021).
- HNSW (Malkov and Yashunin, PAMI 2020): a graph over the fp16 vectors. More memory and a slow build (in one thread, because
  FAISS's graph depends on the order of the threads), higher recall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
import psutil

from lodeset.pipeline.algorithms.neighbors.exact import (
    BLOCK,
    CHUNK_BYTES,
    QUERIES,
    Floats,
    Ints,
    Vectors,
    arithmetic,
    one_thread_each,
    padding,
    ranked,
    same_width,
)
from lodeset.pipeline.errors import LodesetError

Kind = Literal["exact", "ivfpq", "hnsw"]
Asked = Literal["auto", "exact", "ivfpq", "hnsw"]

# Multiply-adds up to which `auto` is exact: 10^5 vectors of 1,280 dimensions against themselves, a minute on two cores.
# It measures work instead of seconds, so that the choice (and with it the result) does not depend on the machine.
EXACT_WORK = 2e13
SMALL = 2_048  # minimum number of vectors for an approximate index
TRAINED = 50  # vectors per cell in the sample that cells and codes are trained on; FAISS asks for 39
DIMENSIONS = 4  # per code of 4 bits
PROBES = 16  # cells searched for each query
LINKS, BREADTH = 32, 80  # for HNSW: neighbors of a node, and candidates during the build
CANDIDATES = 4  # candidates per requested neighbor, and at least 64
ADDED = 65_536  # vectors converted to fp32 and added at once
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """The chosen index, and its estimated cost on this machine: seconds on all `cores`, GiB in all processes."""

    kind: Kind
    queries: int
    vectors: int
    dimensions: int
    seconds: float
    memory_gib: float

    def __str__(self) -> str:
        time = f"{self.seconds:.1f} s" if self.seconds < 60 else f"{self.seconds / 60:,.0f} min"
        whose = "" if self.queries == self.vectors else f" for {self.queries:,} queries"
        return (
            f"neighbors of {self.vectors:,} x {self.dimensions:,}{whose}: {self.kind}, about {time}, "
            f"{self.memory_gib:.1f} GiB"
        )


def plan(queries: int, vectors: int, dimensions: int, k: int, asked: Asked, cores: int) -> Plan:
    """Choose by the amount of work alone; the estimates are for this machine (rates measured on AMD EPYC, 2 cores)."""
    kind: Kind
    if vectors < SMALL or (asked == "auto" and float(queries) * vectors * dimensions <= EXACT_WORK):
        kind = "exact"
    else:
        kind = "ivfpq" if asked == "auto" else asked
    work = float(queries) * vectors
    ranking = queries * (CANDIDATES if kind != "exact" else 2) * k * dimensions * 2.5e-10
    mapped = vectors * dimensions * 2  # fp16, shared by the processes of a machine
    each = min(1.5 * CHUNK_BYTES, 6.0 * vectors * dimensions) + min(QUERIES, queries) * (4 * dimensions + 48 * k)
    if kind == "exact":
        flops = 4e11 if arithmetic() == "bf16" else 1.1e11
        seconds, held = work * (2 * dimensions / flops + 6e-10) + ranking, 0.0
    elif kind == "ivfpq":
        cells = cells_of(vectors)
        assigned = 2.0 * dimensions * cells * (10 * TRAINED * cells + vectors + queries) / 1.1e11
        seconds = assigned + work * PROBES / cells * dimensions / DIMENSIONS * 6e-11 + ranking
        held = vectors * (dimensions / 8 + 8) * cores
    else:
        seconds = vectors * BREADTH * LINKS * dimensions * 4e-10 * cores + queries * k * LINKS * dimensions * 4e-10
        held = _graph_bytes(vectors, dimensions)
    return Plan(kind, queries, vectors, dimensions, seconds / cores, (mapped + each * cores + held) / GIB)


def cells_of(vectors: int) -> int:
    """The power of two closest to sqrt(N), limited so that every cell has enough vectors to train on."""
    return max(1, min(1 << round(math.log2(vectors) / 2), vectors // TRAINED))


def _graph_bytes(vectors: int, dimensions: int) -> float:
    return vectors * (2.0 * dimensions + 8 * LINKS + 16)


def build(vectors: Vectors, kind: Kind, threads: int = 1, seed: int = 0) -> Any:
    """A trained FAISS index of fp16 or fp32 rows [N, D] (may be memory-mapped): the same for the same rows and seed.

    Raises:
        LodesetError: an HNSW graph does not fit into the available memory.
    """
    count, dimensions = vectors.shape
    index: Any  # FAISS's type stubs miss overloads and functions
    if kind == "hnsw":
        needed, at_hand = _graph_bytes(count, dimensions), psutil.virtual_memory().available
        if needed > at_hand:
            raise LodesetError(
                f"an HNSW graph of {count:,} vectors of {dimensions:,} dimensions needs about {needed / GIB:.1f} GiB "
                f"and {at_hand / GIB:.1f} GiB are free: choose `neighbors: ivfpq`"
            )
        faiss.omp_set_num_threads(1)
        index = faiss.IndexHNSWSQ(
            dimensions,
            faiss.ScalarQuantizer.QT_fp16,  # type: ignore[arg-type]
            LINKS,
            faiss.METRIC_INNER_PRODUCT,
        )
        index.hnsw.efConstruction = BREADTH
    else:
        faiss.omp_set_num_threads(threads)
        codes = math.ceil(dimensions / DIMENSIONS)
        width = codes * DIMENSIONS
        cells = cells_of(count)
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFPQFastScan(quantizer, width, cells, codes, 4, faiss.METRIC_INNER_PRODUCT)
        index.cp.spherical, index.cp.niter, index.cp.seed = True, 10, seed + 1234
        index.pq.cp.seed = seed + 1234
        # Codes need a width that they divide; otherwise zeros are appended.
        index = faiss.IndexPreTransform(
            faiss.RemapDimensionsTransform(dimensions, width, False),  # type: ignore[arg-type]
            index,
        )
        sample = np.sort(np.random.default_rng(seed).choice(count, min(count, TRAINED * cells), replace=False))
        index.train(np.ascontiguousarray(vectors[sample], dtype=np.float32))
    for start in range(0, count, ADDED):
        index.add(np.ascontiguousarray(vectors[start : start + ADDED], dtype=np.float32))
    return index


def write(index: Any, write_bytes: Callable[[bytes], object]) -> None:
    """Pass an index's bytes on, piece by piece."""
    faiss.write_index(index, faiss.PyCallbackIOWriter(write_bytes))  # type: ignore[attr-defined]


def read(read_bytes: Callable[[int], bytes]) -> Any:
    """The index whose bytes `write` passed on."""
    return faiss.read_index(faiss.PyCallbackIOReader(read_bytes))  # type: ignore[attr-defined]


class ApproximateIndex:
    """An index and the vectors [N, D] that it was built from."""

    def __init__(self, index: Any, vectors: Vectors, threads: int = 1) -> None:
        self.index = index
        self.vectors = vectors
        self.threads = threads

    def search(self, queries: Vectors, k: int) -> tuple[Floats, Ints]:
        """As `ExactIndex.search`, on the rows that the index finds; -inf and -1 if it finds fewer than k."""
        same_width(queries, self.vectors)
        wanted = min(k, len(self.vectors))
        count = min(max(CANDIDATES * wanted, 64), len(self.vectors))
        if isinstance(self.index, faiss.IndexHNSW):
            self.index.hnsw.efSearch = max(count, 64)
        else:
            faiss.extract_index_ivf(self.index).nprobe = PROBES
        products, rows = padding(len(queries), k)
        with one_thread_each(self.threads) as pool:
            for start in range(0, len(queries), QUERIES):
                block = np.ascontiguousarray(queries[start : start + QUERIES], dtype=np.float32)
                if not np.isfinite(block).all():
                    raise LodesetError("queries contain NaN or infinity: embed drops such images as `not_finite`")
                faiss.omp_set_num_threads(self.threads)
                _, found = self.index.search(block, count)
                found.sort(axis=1)
                pieces = [slice(s, s + BLOCK) for s in range(0, len(block), BLOCK)]
                asked, near = [block[piece] for piece in pieces], [found[piece] for piece in pieces]
                chunk = slice(start, start + len(block))
                products[chunk, :wanted], rows[chunk, :wanted] = ranked(pool, asked, self.vectors, near, wanted)
        return products, rows
