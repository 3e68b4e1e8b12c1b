"""Choose the pool images that a curated set requests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.bytes_]  # image_ids, 32 ASCII digits each (dtype S32)


def seeded_order(ids: Sequence[str], seed: int) -> list[int]:
    """Row numbers in a pseudorandom order that depends only on seed and ids, not on the position of the rows."""
    keys = [hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in ids]
    return sorted(range(len(ids)), key=keys.__getitem__)


def seeded_keys(ids: Ids, seed: int) -> NDArray[np.uint64]:
    """A pseudorandom number for each image_id that depends only on seed and id: uint64 [N].

    The steps of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over the id's 32 bytes, eight at a time.
    """
    keys = np.full(len(ids), _mixed(np.array([seed], np.uint64))[0])
    for words in np.ascontiguousarray(ids).view("<u8").reshape(-1, 4).T:
        keys = _mixed(keys ^ words)
    return keys


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(state ^ (state >> np.uint64(31)))


def ranks(keys: NDArray[Any]) -> NDArray[np.int64]:
    """The number of each row within its run of equal, adjacent keys [N]: 0, 1, ..."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    return np.arange(len(keys)) - np.repeat(starts, np.diff(np.r_[starts, len(keys)]))


def matched_clusters(query_clusters: NDArray[np.int32], min_matches: int) -> NDArray[np.int32]:
    """Ascending clusters that contain at least `min_matches` queries."""
    values, counts = np.unique(query_clusters, return_counts=True)
    return np.asarray(values[counts >= min_matches])


@dataclass(frozen=True)
class Draw:
    """Drawn rows, by cluster and then in the seeded order; `offered` is the number of rows within `per_cluster`, before
    the limit.
    """

    rows: NDArray[np.int64]
    offered: int


def draw(clusters: NDArray[np.int32], ids: Ids, per_cluster: int, limit: int, seed: int) -> Draw:
    """min(per_cluster, size) images of each cluster, at most `limit` in total. `clusters` [N] and `ids` [N] are the
    members.

    Seeded by image_id, so that the order of the rows does not matter. If the limit applies, every cluster keeps the
    same share of its draw (largest remainders first, then cluster number).
    """
    order = np.lexsort((ids, seeded_keys(ids, seed), clusters))
    _, sizes = np.unique(clusters[order], return_counts=True)
    share = np.minimum(sizes, per_cluster)
    offered = int(share.sum())
    if offered > limit:
        exact = share * limit  # in units of 1 / offered: no rounding
        share = exact // offered
        more = np.argsort(-(exact % offered), kind="stable")[: limit - int(share.sum())]
        share[more] += 1
    return Draw(order[ranks(clusters[order]) < np.repeat(share, sizes)], offered)
