"""Find pairs of images with close perceptual hashes. N images."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

HASH_BITS = 64
COPIES = 32  # maximum number of images with the same hash that are compared in full


def hamming_pairs(hashes: NDArray[np.uint64], distance: int) -> tuple[Ints, Ints, NDArray[np.int16]]:
    """Pairs a < b of 64-bit hashes at most `distance` bits apart: (a, b, bits), sorted by (a, b).

    Multi-index hashing (Norouzi, Punjani and Fleet, CVPR 2012): cut into `distance + 1` chunks, two such hashes agree
    in at least one of them, so only distinct hashes that share a chunk are compared.

    Returns all pairs, except among many images with the same hash: if there are more than `COPIES`, each one is paired
    with the `COPIES` next ones, and of two close hashes only the first `COPIES` images are paired. Otherwise a
    placeholder that a crawl met 10,000 times would give 50 million pairs of no further information.
    """
    order = np.argsort(hashes, kind="stable")
    distinct, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    first, second = _close(distinct, distance)
    found_a, found_b = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for step in range(1, min(COPIES, int(counts.max(initial=1)) - 1) + 1):
        position = np.arange(len(order) - step)
        same = hashes[order[position]] == hashes[order[position + step]]
        found_a.append(order[position[same]])
        found_b.append(order[position[same] + step])
    few = np.minimum(counts, COPIES)
    for i in range(int(few[first].max(initial=0))):
        for j in range(int(few[second].max(initial=0))):
            both = (i < few[first]) & (j < few[second])
            found_a.append(order[starts[first[both]] + i])
            found_b.append(order[starts[second[both]] + j])
    a, b = np.concatenate(found_a), np.concatenate(found_b)
    pairs = np.unique(np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1), axis=0).reshape(-1, 2).astype(np.int64)
    bits = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]).astype(np.int16)
    return pairs[:, 0], pairs[:, 1], bits


def _close(distinct: NDArray[np.uint64], distance: int) -> tuple[Ints, Ints]:
    """Rows of distinct hashes at most `distance` bits apart; a pair may occur several times."""
    edges = np.linspace(0, HASH_BITS, distance + 2).astype(int)
    found_a, found_b = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for low, high in itertools.pairwise(edges):
        mask = np.uint64((1 << int(high - low)) - 1)
        values = (distinct >> np.uint64(low)) & mask
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        ends = np.searchsorted(ordered, ordered, side="right")
        # Compare each with the later ones of its run, one offset at a time: memory is N, and the work is the number of
        # pairs within runs.
        offset = 1
        active = np.arange(len(ordered))
        while True:
            active = active[active + offset < ends[active]]
            if not len(active):
                break
            a, b = order[active], order[active + offset]
            near = np.bitwise_count(distinct[a] ^ distinct[b]) <= distance
            found_a.append(a[near])
            found_b.append(b[near])
            offset += 1
    pairs = np.unique(np.stack([np.concatenate(found_a), np.concatenate(found_b)], axis=1), axis=0).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
