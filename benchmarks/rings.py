"""Hierarchical k-means and balanced sampling on five rings of very different densities.

The rings of the README of ssl-data-curation (Vo et al., arXiv:2405.15613): 29,700 points, k = [1000, 300], 1,000 sampled, resampling
on both levels. They overlap; `apart` are the same rings moved until they do not. `uniform` is what a sample uniform over
the support holds of each ring, by integration.

python benchmarks/rings.py [SEEDS]
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

from lodeset.pipeline.algorithms.clusters import hierarchy, kmeans
from lodeset.pipeline.algorithms.clusters.balance import balanced

SIZES = (20_000, 200, 1_000, 500, 8_000)
CENTRES = np.array([[-2.2, 1.0], [0.0, 1.0], [2.2, 1.0], [-1.2, 0.2], [1.2, 0.2]])
INNER, OUTER = 0.7, 1.0
K, SAMPLED, ITERATIONS, RESAMPLING = (1_000, 300), 1_000, 20, 10
CORES = len(os.sched_getaffinity(0))


def rings(centres: np.ndarray, seed: int) -> np.ndarray:
    """Points [29700, 2]: radii uniform between the two, angles uniform."""
    rng = np.random.default_rng(seed)
    found = []
    for size, centre in zip(SIZES, centres, strict=True):
        radius, angle = rng.uniform(INNER, OUTER, size), rng.uniform(0, 2 * np.pi, size)
        found.append(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1) + centre)
    return np.concatenate(found).astype(np.float32)


def uniform(centres: np.ndarray) -> np.ndarray:
    """Shares of the rings in a sample uniform over their union; where two overlap, by their densities there."""
    rng = np.random.default_rng(0)
    spots = rng.uniform(centres.min(0) - OUTER, centres.max(0) + OUTER, (1_000_000, 2))
    away = np.linalg.norm(spots[:, None] - centres, axis=2)
    density = ((away > INNER) & (away < OUTER)) * np.array(SIZES) / away
    inside = density[density.sum(1) > 0]
    return np.asarray((inside / inside.sum(1, keepdims=True)).mean(0))


def main() -> None:
    rows = []
    ring = np.repeat(np.arange(5), SIZES)
    for name, centres in (("overlapping", CENTRES), ("apart", CENTRES * 2.5)):
        for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
            points = rings(centres, seed)
            started = time.perf_counter()
            lowest = hierarchy.resampled(points, K[0], ITERATIONS, RESAMPLING, seed, threads=CORES)
            levels = [lowest, *hierarchy.levels(lowest, K[1:], ITERATIONS, RESAMPLING, seed, threads=CORES)]
            labels, _ = kmeans.assign(points, lowest, CORES)
            paths = hierarchy.paths(labels, hierarchy.parents(levels, CORES))
            drawn = balanced(paths, np.arange(len(points), dtype=np.uint64), SAMPLED, seed)
            seconds = time.perf_counter() - started
            share = np.bincount(ring[drawn], minlength=5) / len(drawn)
            rows.append(
                {
                    "rings": name,
                    "seed": seed,
                    "seconds": round(seconds, 1),
                    "sampled": len(drawn),
                    "shares": share.round(3).tolist(),
                    "uniform": uniform(centres).round(3).tolist(),
                    "largest_distance_from_a_fifth": round(float(np.abs(share - 0.2).max()), 3),
                }
            )
    print(json.dumps({"benchmark": "rings", "cores": CORES, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
