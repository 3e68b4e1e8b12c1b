"""fit_clusters (Ray + FAISS): vectors of the kept pool -> frozen centroids."""

from __future__ import annotations

import functools
import io
import time
from typing import Any

import numpy as np

from pipeline.algorithms import kmeans
from pipeline.dag.fingerprint import digest
from pipeline.dag.stage import Context, Outcome
from pipeline.dag.store import Artifact, File, Part, Rows, Store
from pipeline.engines.ray import map_items
from pipeline.errors import LodesetError
from pipeline.stages.kept import pool_kept, vectors_sorted
from pipeline.stages.parts import made

VERSION = 1
STAGE = "fit_clusters"


def run(context: Context) -> Outcome:
    vectors, dedup = context.inputs["vectors"], context.inputs["dedup"]
    images = len(pool_kept(context.store, dedup))
    if images == 0:
        raise LodesetError(f"dedup kept no pool image ({dict(dedup.rows.dropped)}): there is nothing to cluster")
    asked = context.config["k"]
    k = kmeans.choose_k(images) if asked == "auto" else asked
    if k > images:
        raise LodesetError(
            f"cluster.k = {k} is more than the {images} images that dedup kept: choose at most {images}, or `auto`"
        )
    key = digest(STAGE, VERSION, context.fingerprint)
    make = functools.partial(_fit, context.store, vectors, dedup, k, dict(context.config), key)
    parts, new = made(
        context, STAGE, [(key, None, images)], functools.partial(map_items, make, cpus=1, address=context.ray_address)
    )
    return Outcome(
        tables={"centroids": (parts[0].files["centroids"],)},
        rows=Rows(taken=images, kept=images),
        details={
            "k": k,
            "mean_squared_distance": parts[0].counts["micro_distance"] / 1e6,
            "parts": 1,
            "parts_made": len(new),
        },
    )


def _fit(store: Store, vectors: Artifact, dedup: Artifact, k: int, config: dict[str, Any], key: str, _: None) -> Part:
    started = time.time()
    ids, matrix = vectors_sorted(store, vectors.tables["vectors"], pool_kept(store, dedup))
    centroids, distance = kmeans.fit(matrix.astype(np.float32), k, config["iterations"], config["seed"])
    buffer = io.BytesIO()
    np.save(buffer, centroids)
    relative = f"parts/{STAGE}/{key}/{time.time_ns():x}-centroids.npy"
    with store.writing(relative) as sink:
        sink.write(buffer.getvalue())
    file = File(relative, k, sink.size_bytes, sink.sha256())
    counts = {"images": len(ids), "micro_distance": round(distance * 1e6)}
    return store.commit_part(STAGE, key, {}, counts, time.time() - started, files={"centroids": file})


def read_centroids(store: Store, fitted: Artifact) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """float32 [K, D]."""
    with store.fs.open(store.path(fitted.tables["centroids"][0].path), "rb") as file:
        return np.asarray(np.load(file, allow_pickle=False))
