"""Exact self-neighbours against FAISS's flat index; and how neighbours, components and k-means grow from 10^4 to 10^6 vectors.

    python benchmarks/neighbours.py flat [VECTORS.npz | VECTORS.parquet | N] [ROUNDS]
    python benchmarks/neighbours.py growth [LARGEST]

`flat`: k = 64 of every vector (a file's `P` or `vector` column; N seeded clustered ones of 1,280 dimensions otherwise), on
2 threads, interleaved in one run after a warm-up; both begin with the vectors and end with the answer.
`growth`: seeded clustered vectors of 256 dimensions in a memory map, a hundredth of them planted near-duplicates (cosine
about .97) of others; k = 16 neighbours, as `neighbors: auto` chooses; components of the pairs above .9; k-means of 1,000
clusters in 20 steps. Each size in a process of its own.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # NumPy's; the others are told below

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq

from lodeset.pipeline.algorithms.clusters import kmeans
from lodeset.pipeline.algorithms.clusters.points import Points
from lodeset.pipeline.algorithms.copies.components import components
from lodeset.pipeline.algorithms.neighbors import approximate
from lodeset.pipeline.algorithms.neighbors.exact import ExactIndex, arithmetic

THREADS = 2
LINKED, CLUSTERS = 0.9, 1_000


def seeded(out: np.ndarray, seed: int = 0) -> np.ndarray:
    """Fills [N, D] with unit vectors around N / 50 centres; the last hundredth are near-copies of the first one's rows."""
    rows, width = out.shape
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, rows // 50), width)).astype(np.float32)
    planted = rows // 100
    for start in range(0, rows, 16_384):
        stop = min(start + 16_384, rows)
        x = centres[rng.integers(0, len(centres), stop - start)]
        x = x + 0.7 * rng.normal(size=x.shape).astype(np.float32)
        out[start:stop] = x / np.linalg.norm(x, axis=1, keepdims=True)
    copies = out[:planted].astype(np.float32) + 0.25 / width**0.5 * rng.normal(size=(planted, width)).astype(np.float32)
    out[rows - planted :] = copies / np.linalg.norm(copies, axis=1, keepdims=True)
    return out


def loaded(source: str) -> np.ndarray:
    if source.endswith(".npz"):
        return np.asarray(np.load(source)["P"], dtype=np.float16)
    if source.endswith(".parquet"):
        column = pq.read_table(source, columns=["vector"])["vector"].combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1).astype(np.float16)
    return seeded(np.empty((int(source), 1_280), np.float16))


def flat(vectors: np.ndarray, rounds: int, k: int = 64) -> dict[str, object]:
    whole = vectors.astype(np.float32)

    def by_faiss() -> tuple[np.ndarray, np.ndarray]:
        faiss.omp_set_num_threads(THREADS)
        index = faiss.IndexFlatIP(whole.shape[1])
        index.add(whole)
        return index.search(whole, k)

    ways = {
        "faiss": by_faiss,
        arithmetic(): lambda: ExactIndex(vectors, THREADS).search(vectors, k),
        "fp32": lambda: ExactIndex(vectors, THREADS, "fp32").search(vectors, k),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            found[name] = way()
            if turn:  # the first is the warm-up
                times[name].append(round(time.perf_counter() - started, 3))
    seconds = {name: statistics.median(t) for name, t in times.items()}
    # A row counts as found where its product is no less than the k-th of FAISS: fp32 cannot order closer ones.
    kth = found["faiss"][0][:, -1:] - 1e-6
    return {
        "benchmark": "neighbours flat",
        "vectors": list(vectors.shape),
        "k": k,
        "threads": THREADS,
        "seconds": seconds,
        "all": times,
        "ratio": {name: round(s / seconds["faiss"], 3) for name, s in seconds.items() if name != "faiss"},
        "recall": {name: round(float((p >= kth).mean()), 6) for name, (p, _) in found.items() if name != "faiss"},
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def one_size(rows: int, width: int = 256, k: int = 16) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        seeded(np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, width))).flush()
        vectors = np.asarray(np.load(path, mmap_mode="c"))
        plan = approximate.plan(rows, rows, width, k, "auto", THREADS)
        print(plan, file=sys.stderr, flush=True)
        started = time.perf_counter()
        if plan.kind == "exact":
            index: ExactIndex | approximate.ApproximateIndex = ExactIndex(vectors, THREADS)
        else:
            built = approximate.build(vectors, plan.kind, THREADS)
            index = approximate.ApproximateIndex(built, vectors, THREADS)
        ready = time.perf_counter()
        hits = [index.search(vectors[s : s + 4_096], k + 1) for s in range(0, rows, 4_096)]
        products, found = (np.concatenate(one) for one in zip(*hits, strict=True))
        searched = time.perf_counter()
        del index, hits
        near = products > LINKED
        component = components(rows, np.repeat(np.arange(rows), near.sum(axis=1)), found[near])
        linked = time.perf_counter()
        planted = rows // 100
        pairs = (found[:planted] == np.arange(rows - planted, rows)[:, None]).any(axis=1)
        del products, found, near
        points = Points(vectors, np.arange(rows, dtype=np.uint64), THREADS)
        fit = kmeans.fit_each(kmeans.here([points]), min(CLUSTERS, rows), 20, seed=0)
        ended = time.perf_counter()
    return {
        "vectors": rows,
        "index": plan.kind,
        "estimated_neighbours_s": round(plan.seconds, 1),
        "build_s": round(ready - started, 2),
        "neighbours_s": round(searched - started, 2),
        "components_s": round(linked - searched, 2),
        "kmeans_s": round(ended - linked, 2),
        "kmeans_steps": len(fit.distances),
        "seconds": round(ended - started, 2),
        "planted_recall": round(float(pairs.mean()), 4),
        "planted_joined": round(float((component[:planted] == component[rows - planted :]).mean()), 4),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def growth(largest: int) -> dict[str, object]:
    sizes = [n for n in (10_000, 100_000, 1_000_000) if n <= largest]
    results = []
    for size in sizes:
        done = subprocess.run([sys.executable, __file__, "size", str(size)], stdout=subprocess.PIPE, check=True)
        results.append(json.loads(done.stdout))
    seconds = [r["seconds"] for r in results]
    slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0] if len(sizes) > 1 else None
    return {
        "benchmark": "growth",
        "dimensions": 256,
        "k": 16,
        "threads": THREADS,
        "sizes": results,
        "slope": None if slope is None else round(float(slope), 3),
    }


def main() -> None:
    mode, argument = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    if mode == "flat":
        rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
        print(json.dumps(flat(loaded(argument or "15866"), rounds)))
    elif mode == "growth":
        print(json.dumps(growth(int(argument or 1_000_000))))
    elif mode == "size":
        print(json.dumps(one_size(int(argument))))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
