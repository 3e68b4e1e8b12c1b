"""k-means against FAISS and scikit-learn on the same vectors: seconds, interleaved, and the mean squared distance reached.

python benchmarks/kmeans.py VECTORS.npz KEY [ROUNDS] [fp32]

VECTORS.npz holds an array [N, D] under KEY. FAISS runs with its defaults but for 20 iterations, so it takes at most 256 points a
cluster (all, where N is less); scikit-learn with k-means++, one start, 20 iterations, is skipped where it is not installed.
`fp32` does without bf16. Threads: all cores, for each.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import faiss
import numpy as np
import torch

from lodeset.pipeline.algorithms.clusters import kmeans

ITERATIONS = 20
CORES = len(os.sched_getaffinity(0))
Floats = np.ndarray


def ours(vectors: Floats, k: int, seed: int) -> Floats:
    return kmeans.fit(vectors.astype(np.float16), k, ITERATIONS, seed, threads=CORES).centroids


def with_faiss(vectors: Floats, k: int, seed: int) -> Floats:
    faiss.omp_set_num_threads(CORES)
    fitted = faiss.Kmeans(vectors.shape[1], k, niter=ITERATIONS, seed=seed + 1)
    fitted.train(vectors)
    return fitted.centroids


def with_sklearn(vectors: Floats, k: int, seed: int) -> Floats:
    from sklearn.cluster import KMeans

    return KMeans(k, init="k-means++", n_init=1, max_iter=ITERATIONS, random_state=seed).fit(vectors).cluster_centers_


def distance(vectors: Floats, centroids: Floats) -> float:
    """Mean squared distance to the nearest centroid, in float64, the same for all."""
    rows, targets = torch.from_numpy(vectors).double(), torch.from_numpy(centroids).double()
    return float(sum(torch.cdist(r, targets).amin(1).square().sum() for r in rows.split(1024)) / len(rows))


def main() -> None:
    vectors = np.ascontiguousarray(np.load(sys.argv[1], allow_pickle=False)[sys.argv[2]], np.float32)
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    if "fp32" in sys.argv[4:]:
        kmeans.has_bf16 = lambda: False
    fits: dict[str, Callable[[Floats, int, int], Floats]] = {"lodeset": ours, "faiss": with_faiss}
    if importlib.util.find_spec("sklearn"):
        fits["scikit-learn"] = with_sklearn
    rows = []
    for k in (200, 1000):
        for fit in (ours, with_faiss):
            fit(vectors[: 4 * k], k, 0)  # the first call of a library starts its threads
        seconds: dict[str, list[float]] = {name: [] for name in fits}
        reached: dict[str, list[float]] = {name: [] for name in fits}
        for seed in range(rounds):
            for name, fit in fits.items():
                with contextlib.redirect_stdout(sys.stderr):
                    started = time.perf_counter()
                    centroids = fit(vectors, k, seed)
                    seconds[name].append(time.perf_counter() - started)
                reached[name].append(distance(vectors, centroids))
        rows.append(
            {
                "k": k,
                "seconds": {name: round(statistics.median(s), 2) for name, s in seconds.items()},
                "mean_squared_distance": {name: [round(d, 5) for d in ds] for name, ds in reached.items()},
                "seconds_to_faiss": round(
                    statistics.median(seconds["lodeset"]) / statistics.median(seconds["faiss"]), 2
                ),
            }
        )
    bf16 = kmeans.has_bf16()
    print(
        json.dumps(
            {"benchmark": "kmeans", "shape": vectors.shape, "cores": CORES, "bf16": bf16, "rows": rows}, indent=1
        )
    )


if __name__ == "__main__":
    main()
