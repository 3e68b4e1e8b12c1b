"""Semantic duplicates within one cluster (SemDeDup: Abbas, Tirumala, Simig, Ganguli and Morcos, 2023). N images, D dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
# Which of a group of semantic duplicates stays: the one farthest from the centroid of its cluster (the paper's choice), the nearest,
# or any.
Keep = Literal["far", "centroid", "random"]

AT_ONCE = 2_048  # images of a block: similarities to all before them take AT_ONCE x N x 4 bytes


@dataclass(frozen=True)
class Duplicates:
    """Per image: whether it is dropped, the image before it in the order that is most similar (-1 for the first), and how similar."""

    dropped: Flags
    match: Ints
    similarity: Floats


def order_of(vectors: Floats, centroid: Floats, keep: Keep, keys: NDArray[np.uint64], first: Flags) -> Ints:
    """The order [N] in which images are taken, those first that are to stay.

    Args:
        vectors: [N, D], L2-normalized.
        keys: [N], decide between equals, and everything if `keep` is `random`.
        first: [N], images that stay whatever else is there.
    """
    if keep == "random":
        return np.lexsort((keys, ~first))
    length = max(float(np.linalg.norm(centroid)), 1e-12)
    distance = 1 - vectors @ (centroid / length)
    return np.lexsort((keys, distance if keep == "centroid" else -distance, ~first))


def duplicates(vectors: Floats, order: Ints, eps: float, first: Flags) -> Duplicates:
    """Which images are dropped: those whose cosine similarity to any image before them in the order is above 1 - eps.

    As in the paper's code, an image before them counts even if it is dropped itself.

    Args:
        vectors: [N, D], L2-normalized.
        order: [N], the rows in the order in which they are taken.
        first: [N], rows that stay; they come first in the order.
    """
    count = len(vectors)
    taken = vectors[order]
    match, similarity = np.full(count, -1, np.int64), np.full(count, -1, np.float32)
    for start in range(0, count, AT_ONCE):
        stop = min(start + AT_ONCE, count)
        found = taken[start:stop] @ taken[:stop].T
        found[np.arange(stop)[None] >= np.arange(start, stop)[:, None]] = -np.inf
        best = found.argmax(axis=1)
        highest = found[np.arange(stop - start), best]
        there = np.isfinite(highest)
        match[order[start:stop][there]] = order[best[there]]
        similarity[order[start:stop][there]] = highest[there]
    return Duplicates((similarity > 1 - eps) & ~first, match, similarity)
