"""fit_map: vectors of the pool -> how images are placed on the map: by the first two principal components of a sample, or by UMAP.

UMAP (McInnes et al. 2018) lays out the sample, and any other image lies where its nearest neighbors in the sample do. The map is frozen: a
run over a grown pool places its images on the same one, so maps of two runs can be compared.
"""

from __future__ import annotations

import io
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.neighbors.approximate import ApproximateIndex, build, plan
from lodeset.pipeline.algorithms.neighbors.exact import ExactIndex
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context, Outcome, Progress
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.stages.inspect.graph import FitMapSpec
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.kept import fixed
from lodeset.pipeline.tables.vectors import read_vectors

STAGE = "fit_map"
# This share of the sample lies between -1 and 1 on each axis.
WITHIN = 0.995
# UMAP's defaults, and how many images of the sample place another one.
NEIGHBORS, EPOCHS, PLACED_BY = 15, 200, 5
SEED = 0

Floats = NDArray[np.float32]
Place = Callable[[Floats], Floats]


def run(context: Context[FitMapSpec, None]) -> Outcome:
    store, vectors = context.store, context.inputs["vectors"]
    started = time.perf_counter()
    context.report(Progress(0.0, phase="sample"))
    sample = _sample(store, vectors, context.spec.sample)
    context.report(Progress(0.0, phase=context.spec.method))
    arrays = by_umap(sample, context.cpus) if context.spec.method == "umap" else by_principal_components(sample)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    key = digest(STAGE, context.spec.VERSION, context.fingerprint)
    relative = f"parts/{STAGE}/{key}/{uuid.uuid4().hex[:12]}-map.npz"
    with store.writing(relative) as sink:
        sink.write(buffer.getvalue())
    file = File(relative, len(sample), sink.size_bytes, sink.sha256())
    part = store.commit_part(
        STAGE, key, {}, {"images": len(sample)}, time.perf_counter() - started, files={"map": file}
    )
    total = vectors.rows.kept
    left = total - len(sample)
    return Outcome(
        tables={"map": (part.files["map"],)},
        rows=Rows(taken=total, kept=len(sample), dropped={"not_sampled": left} if left else {}),
    )


def _sample(store: Store, vectors: Artifact, count: int) -> Floats:
    """The vectors [M, D] of the `count` smallest image_ids: these are digests, so that is a uniform sample, and stays much the same
    when the pool grows.
    """
    files = vectors.tables["vectors"]
    ids = fixed(store.table(files, ["image_id"], records.vectors(1))["image_id"])
    last = np.partition(ids, count)[count] if len(ids) > count else None
    found: list[NDArray[np.float16]] = []
    for file in files:
        some, matrix = read_vectors(store, [file])
        found.append(matrix if last is None else matrix[np.array(some, "S32") < last])
    return np.concatenate(found).astype(np.float32) if found else np.zeros((0, 1), np.float32)


def by_principal_components(sample: Floats) -> dict[str, Floats]:
    """`mean` [D] and `axes` [2, D] of a sample [M, D]; `(vectors - mean) @ axes.T` lies between -1 and 1 for nearly all of it."""
    dimensions = sample.shape[1]
    mean = sample.mean(axis=0) if len(sample) else np.zeros(dimensions, np.float32)
    centered = sample - mean
    _, found = np.linalg.eigh(centered.T.astype(np.float64) @ centered)
    axes = np.zeros((2, dimensions))
    axes[: min(2, dimensions)] = found[:, ::-1].T[:2]
    # An eigenvector has no sign of its own.
    axes *= np.where(axes[np.arange(2), np.abs(axes).argmax(axis=1)] < 0, -1.0, 1.0)[:, None]
    axes /= _spread(centered @ axes.T)
    return {"mean": mean.astype(np.float32), "axes": axes.astype(np.float32)}


def by_umap(sample: Floats, threads: int) -> dict[str, Any]:
    """The `sample` [M, D] in 16 bits, and where UMAP puts it: `points` [M, 2].

    Raises:
        LodesetError: UMAP is not installed, or the sample is too small for it.
    """
    try:
        from umap import UMAP
    except ImportError:
        raise LodesetError(
            "`inspect: {map: umap}` needs umap-learn: `pip install 'lodeset[umap]'`, or use `map: pca`"
        ) from None
    if len(sample) <= NEIGHBORS:
        raise LodesetError(
            f"UMAP needs more than {NEIGHBORS} images, and the pool has {len(sample)}: use `inspect: {{map: pca}}`"
        )
    cosine, rows = _index(sample, NEIGHBORS, threads).search(sample, NEIGHBORS)
    distance = np.clip(1 - cosine, 0, None)
    with warnings.catch_warnings():
        # That a seed takes one thread, and that it cannot place others, which is done here.
        warnings.filterwarnings("ignore", category=UserWarning, module="umap")
        layout = UMAP(
            n_neighbors=NEIGHBORS,
            n_epochs=EPOCHS,
            metric="cosine",
            random_state=SEED,
            precomputed_knn=(rows, distance, None),
        )
        points = np.asarray(layout.fit_transform(sample), np.float64)
    points -= points.mean(axis=0)
    return {"sample": sample.astype(np.float16), "points": (points / _spread(points)).astype(np.float32)}


def _index(vectors: Floats, k: int, threads: int) -> ExactIndex | ApproximateIndex:
    count, dimensions = vectors.shape
    chosen = plan(count, count, dimensions, k, "auto", threads)
    if chosen.kind == "exact":
        return ExactIndex(vectors, threads)
    return ApproximateIndex(build(vectors, chosen.kind, threads, SEED), vectors, threads)


def _spread(points: NDArray[np.float64]) -> float:
    """One scale for both axes: distances mean the same in every direction."""
    return max(float(np.quantile(np.abs(points), WITHIN, axis=0).max()) if len(points) else 0.0, 1e-9)


def placing(store: Store, fitted: Artifact, threads: int) -> tuple[int, Place]:
    """The width D of the vectors that the map places, and what places them: [N, D] -> [N, 2]."""
    with store.opened(fitted.tables["map"][0]) as file, np.load(file, allow_pickle=False) as found:
        arrays: Mapping[str, Any] = {name: found[name] for name in found.files}
    if "axes" in arrays:
        mean, axes = arrays["mean"], arrays["axes"]
        return len(mean), lambda vectors: np.asarray((vectors - mean) @ axes.T, np.float32)
    sample, points = arrays["sample"].astype(np.float32), arrays["points"]
    index = _index(sample, PLACED_BY, threads)

    def place(vectors: Floats) -> Floats:
        cosine, rows = index.search(vectors, PLACED_BY)
        weight = np.where(
            np.isfinite(cosine), 1 / np.clip(1 - cosine, 1e-6, None), 0
        )  # of the image itself: nearly all
        weight /= weight.sum(axis=1, keepdims=True)
        return np.asarray(np.einsum("nk,nkd->nd", weight, points[rows]), np.float32)

    return sample.shape[1], place
