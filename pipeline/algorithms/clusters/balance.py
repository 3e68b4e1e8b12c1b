"""Balanced top-down sampling from a hierarchy of clusters (Vo et al., arXiv:2405.15613, section 3.3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.clusters.points import Ints, Keys, hashed


def shared(sizes: Ints, request: int, order: Keys) -> Ints:
    """The number of rows that each cluster gives: as evenly as their sizes allow, `request` in total or everything.

    A cluster smaller than the common share gives all its rows, and the others share the difference. The remainder goes,
    one row each, to the clusters that are first in `order`.
    """
    if request >= sizes.sum():
        return sizes.copy()
    low, high = 0, int(sizes.max())  # binary search for the largest share whose sum stays within the request
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(sizes, middle).sum() <= request:
            low = middle
        else:
            high = middle - 1
    given = np.minimum(sizes, low)
    able = np.flatnonzero(sizes > low)
    given[able[np.argsort(order[able], kind="stable")[: request - int(given.sum())]]] += 1
    return given


def balanced(paths: NDArray[np.int32], keys: Keys, request: int, seed: int) -> Ints:
    """Ascending rows of a sample in which every cluster of every level has an equal share, as far as its size allows.

    Inside a lowest cluster, rows are drawn at random (the default of the published code; its alternative is the rows
    nearest to the centroid), by the hash of their keys, so that the sample does not depend on the order of the rows.

    Args:
        paths: clusters from the top level down, int32 [N, levels], numbered across a whole level.
        keys: one per row, distinct (`keys_of` their image_ids).
        request: number of rows to draw; all rows if there are fewer.
    """
    levels = paths.shape[1]
    order = np.lexsort((keys, hashed(keys, seed, 0), *paths.T[::-1]))
    ordered = paths[order]
    drawn: list[Ints] = []
    work = [(0, len(order), 0, request)]
    while work:
        start, stop, level, wanted = work.pop()
        if wanted == 0:
            continue
        if level == levels:
            drawn.append(order[start : start + wanted])
            continue
        clusters, first = np.unique(ordered[start:stop, level], return_index=True)
        ends = np.append(first[1:], stop - start)
        given = shared(ends - first, wanted, hashed(clusters.astype(np.uint64), seed, level + 1))
        work += [
            (start + int(a), start + int(b), level + 1, int(n)) for a, b, n in zip(first, ends, given, strict=True) if n
        ]
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, np.int64)
