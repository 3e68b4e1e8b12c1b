"""Hierarchical k-means with resampling (Vo et al., arXiv:2405.15613, section 3). n items, K clusters, D dimensions.

Each level clusters the centroids of the level below. k-means puts centroids where points are dense; a resampling step
fits again to a few points nearest to each centroid, where every cluster has the same weight, so that the centroids
become more uniform over the support of the data. Every step is seeded anew: started from the previous centroids, it
would stay where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.clusters import kmeans
from lodeset.pipeline.algorithms.clusters.points import Floats, Ints, Vectors
from lodeset.pipeline.errors import LodesetError


def checked(k: Sequence[int], images: int) -> None:
    """Raise LodesetError unless the levels, lowest first, decrease and do not exceed the number of images."""
    if list(k) != sorted(set(k), reverse=True):
        raise LodesetError(
            f"cluster.k = {list(k)}: each level must have fewer clusters than the previous one (lowest first)"
        )
    if k[0] > images:
        raise LodesetError(
            f"cluster.k = {k[0]} is more than the {images} images that dedup kept: choose at most {images}, or `auto`"
        )


def resampled_each(images: int, k: int) -> int:
    """Points taken from each cluster in a resampling step: half of the mean cluster, at least 2 (15 and 2 in the
    paper's rings).
    """
    return max(2, round(images / k / 2))


def levels(
    lowest: Floats,
    k: Sequence[int],
    iterations: int,
    resampling: int,
    seed: int,
    spherical: bool = False,
    threads: int = 1,
) -> list[Floats]:
    """The levels above the lowest centroids [K_1, D]: centroids fp32 [K_2, D], [K_3, D], ... for k = (K_2, K_3,
    ...).
    """
    above: list[Floats] = []
    items = lowest
    for number, clusters in enumerate(k):
        items = resampled(items, clusters, iterations, resampling, seed + number + 1, spherical, threads)
        above.append(items)
    return above


def resampled(
    items: Vectors, k: int, iterations: int, resampling: int, seed: int, spherical: bool = False, threads: int = 1
) -> Floats:
    """One level: k-means of the items [n, D], then `resampling` times of the items nearest to each centroid; fp32 [K,
    D].
    """
    centroids = kmeans.fit(items, k, iterations, seed, spherical=spherical, threads=threads).centroids
    count = resampled_each(len(items), k)
    for step in range(resampling):
        labels, squared = kmeans.assign(items, centroids, threads)
        chosen = nearest_members(labels, squared, count)
        if len(chosen) < k:
            return centroids  # too many clusters are empty to take enough items from the others
        again = kmeans.fit(
            items[chosen], k, iterations, seed + 1_000 * (step + 1), spherical=spherical, threads=threads
        )
        centroids = again.centroids
    return centroids


def nearest_members(labels: NDArray[np.int32], squared: Floats, count: int) -> Ints:
    """Ascending rows of the `count` members of each cluster nearest to its centroid (ties: the lower row)."""
    order = np.lexsort((np.arange(len(labels)), squared, labels))
    ordered = labels[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    return np.sort(order[np.arange(len(order)) - starts < count])


def parents(centroids: Sequence[Floats], threads: int = 1) -> list[NDArray[np.int32]]:
    """The parent of every cluster, one array per level except the top one; centroids lowest level first."""
    return [kmeans.assign(below, above, threads)[0] for below, above in pairwise(centroids)]


def paths(labels: NDArray[np.int32], above: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Clusters of each image from the top level down, int32 [N, levels], from its lowest cluster and the result of
    `parents`.
    """
    columns = [labels]
    for parent in above:
        columns.append(parent[columns[-1]])
    return np.stack(columns[::-1], axis=1)
