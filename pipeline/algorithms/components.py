"""Connected components and who represents them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Ints = NDArray[np.int64]


def components(count: int, a: Ints, b: Ints) -> Ints:
    """The component of each of `count` nodes under the edges (a, b): the smallest node number in it, int64 [count]."""
    matrix = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(count, count))
    _, labels = connected_components(matrix, directed=False)
    first = np.full(labels.max(initial=-1) + 1, count, np.int64)
    np.minimum.at(first, labels, np.arange(count))
    return np.asarray(first[labels])


def size_limit(pool: int) -> int:
    """A near-duplicate group larger than this means a wrong threshold, not that many copies."""
    return max(100, pool // 1000)


def keepers(component: Ints, area: Ints, standing: NDArray[np.bool_]) -> Ints:
    """For each node, which node of its component is kept: of those that stood before if there are any, else of all, the largest
    image, then the smallest node number.

    Nodes must be numbered in the order of their ids.
    """
    order = np.lexsort((np.arange(len(component)), -area, ~standing, component))
    firsts = np.r_[True, component[order][1:] != component[order][:-1]] if len(order) else np.zeros(0, bool)
    best = np.full(len(component), -1, np.int64)
    best[component[order][firsts]] = order[firsts]
    return np.asarray(best[component])
