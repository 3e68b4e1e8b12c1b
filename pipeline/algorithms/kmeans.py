"""k-means. N vectors, K clusters, D dimensions."""

from __future__ import annotations

import warnings

import faiss
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def choose_k(images: int) -> int:
    """max(N / 7440, min(N / 50, 256)), at least 1: 7440 is the mean cluster of LVD-142M (744M images, 100,000 clusters)."""
    return max(1, round(images / 7440), min(images // 50, 256))


def fit(vectors: Floats, k: int, iterations: int, seed: int) -> tuple[Floats, float]:
    """Centroids [K, D] and the mean squared distance to them.

    One thread: FAISS's sums depend on how many there are, and centroids must not.
    """
    faiss.omp_set_num_threads(1)
    kmeans = faiss.Kmeans(
        vectors.shape[1], k, niter=iterations, seed=seed, min_points_per_centroid=1, max_points_per_centroid=2**31 - 1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kmeans.train(np.ascontiguousarray(vectors, dtype=np.float32))
    return np.asarray(kmeans.centroids), float(np.asarray(kmeans.obj)[-1]) / len(vectors)


def assign(vectors: Floats, centroids: Floats) -> tuple[NDArray[np.int32], Floats]:
    """The nearest centroid of each vector, int32 [N], and the squared distance to it."""
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, dtype=np.float32))
    distance, nearest = index.search(np.ascontiguousarray(vectors, dtype=np.float32), 1)
    return nearest[:, 0].astype(np.int32), distance[:, 0]
