"""Exact nearest neighbours by cosine, and pairs of close perceptual hashes. N images, Q queries, D dimensions."""

from __future__ import annotations

import itertools

import faiss
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

HASH_BITS = 64


class ExactIndex:
    """All vectors [N, D] in memory in fp32; L2-normalised rows make inner products cosines."""

    def __init__(self, vectors: NDArray[np.float16] | Floats, threads: int = 1) -> None:
        faiss.omp_set_num_threads(threads)
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def search(self, queries: NDArray[np.float16] | Floats, k: int) -> tuple[Floats, Ints]:
        """Similarities [Q, k] in falling order and row numbers [Q, k]; -1 where there are fewer than k rows.

        Equal similarities are ordered by row number, so that the answer does not depend on how FAISS blocks its work.
        """
        similarity, rows = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        order = np.lexsort((rows, -similarity), axis=1)
        return np.take_along_axis(similarity, order, 1), np.take_along_axis(rows, order, 1)


def hamming_pairs(hashes: NDArray[np.uint64], distance: int) -> tuple[Ints, Ints, NDArray[np.int16]]:
    """All pairs a < b of 64-bit hashes at most `distance` bits apart: (a, b, bits), sorted by (a, b).

    Multi-index hashing (Norouzi, Punjani and Fleet, CVPR 2012): cut into `distance + 1` chunks, two such hashes agree
    in at least one of them, so only images that share a chunk are compared.
    """
    chunks = distance + 1
    edges = np.linspace(0, HASH_BITS, chunks + 1).astype(int)
    found_a: list[Ints] = []
    found_b: list[Ints] = []
    for low, high in itertools.pairwise(edges):
        mask = np.uint64((1 << int(high - low)) - 1)
        values = (hashes >> np.uint64(low)) & mask
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        ends = np.searchsorted(ordered, ordered, side="right")
        # Compare each with those after it in its run, one offset at a time: work is what the runs hold, memory is N.
        offset = 1
        active = np.arange(len(ordered))
        while True:
            active = active[active + offset < ends[active]]
            if not len(active):
                break
            a, b = order[active], order[active + offset]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
            found_a.append(np.minimum(a[near], b[near]))
            found_b.append(np.maximum(a[near], b[near]))
            offset += 1
    if not found_a:
        empty = np.zeros(0, np.int64)
        return empty, empty, np.zeros(0, np.int16)
    pairs = np.unique(np.stack([np.concatenate(found_a), np.concatenate(found_b)], axis=1), axis=0).astype(np.int64)
    bits = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]).astype(np.int16)
    return pairs[:, 0], pairs[:, 1], bits
