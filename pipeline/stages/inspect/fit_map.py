"""fit_map: vectors of the pool -> two axes on which every image is drawn: the first principal components of a sample.

The axes are frozen: a run over a grown pool draws its images on the same map, so maps of two runs can be compared.
"""

from __future__ import annotations

import io
import time
import uuid

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.stages.inspect.graph import FitMapSpec
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.kept import fixed
from lodeset.pipeline.tables.vectors import read_vectors

STAGE = "fit_map"
# This share of the sample lies between -1 and 1 on each axis.
WITHIN = 0.995

Floats = NDArray[np.float32]


def run(context: Context[FitMapSpec, None]) -> Outcome:
    store, vectors = context.store, context.inputs["vectors"]
    started = time.perf_counter()
    sample = _sample(store, vectors, context.spec.sample)
    mean, axes = principal_axes(sample)
    buffer = io.BytesIO()
    np.savez(buffer, mean=mean, axes=axes)
    key = digest(STAGE, context.spec.VERSION, context.fingerprint)
    relative = f"parts/{STAGE}/{key}/{uuid.uuid4().hex[:12]}-axes.npz"
    with store.writing(relative) as sink:
        sink.write(buffer.getvalue())
    file = File(relative, 2, sink.size_bytes, sink.sha256())
    part = store.commit_part(
        STAGE, key, {}, {"images": len(sample)}, time.perf_counter() - started, files={"axes": file}
    )
    total = vectors.rows.kept
    left = total - len(sample)
    return Outcome(
        tables={"axes": (part.files["axes"],)},
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


def principal_axes(sample: Floats) -> tuple[Floats, Floats]:
    """Mean [D] and axes [2, D] of a sample [M, D]; `(vectors - mean) @ axes.T` lies between -1 and 1 for nearly all of it."""
    dimensions = sample.shape[1]
    mean = sample.mean(axis=0) if len(sample) else np.zeros(dimensions, np.float32)
    centered = sample - mean
    _, found = np.linalg.eigh(centered.T.astype(np.float64) @ centered)
    axes = np.zeros((2, dimensions))
    axes[: min(2, dimensions)] = found[:, ::-1].T[:2]
    # An eigenvector has no sign of its own.
    axes *= np.where(axes[np.arange(2), np.abs(axes).argmax(axis=1)] < 0, -1.0, 1.0)[:, None]
    spread = np.quantile(np.abs(centered @ axes.T), WITHIN, axis=0) if len(sample) else np.ones(2)
    axes /= max(float(spread.max()), 1e-9)  # one scale for both: distances mean the same in every direction
    return mean.astype(np.float32), axes.astype(np.float32)


def read_axes(store: Store, fitted: Artifact) -> tuple[Floats, Floats]:
    """Mean [D] and axes [2, D]."""
    with store.opened(fitted.tables["axes"][0]) as file, np.load(file, allow_pickle=False) as found:
        return np.asarray(found["mean"]), np.asarray(found["axes"])
