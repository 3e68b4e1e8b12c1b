"""Connected components."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Ints = NDArray[np.int64]


def components(count: int, a: Ints, b: Ints) -> Ints:
    """The component of each of `count` nodes under the edges (a, b): its smallest node number, int64 [count]."""
    matrix = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(count, count))
    _, labels = connected_components(matrix, directed=False)
    first = np.full(labels.max(initial=-1) + 1, count, np.int64)
    np.minimum.at(first, labels, np.arange(count))
    return np.asarray(first[labels])


def size_limit(pool: int) -> int:
    """The maximum size of a near-duplicate group: a larger one indicates a wrong threshold, not that many copies."""
    return max(100, pool // 1000)
