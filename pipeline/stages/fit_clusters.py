"""fit_clusters (Ray): vectors of the kept pool -> centroids, one file a level, lowest first.

Those of the run before are kept as long as they fit the pool as it is now: what lies downstream depends on the centroids, not on
the images that they were fitted on. Otherwise actors hold the vectors, each some files of them; a Lloyd step runs on all of them
and its sums meet here. The levels above the lowest cluster centroids, which are few: they are fitted here.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lodeset.pipeline.algorithms.clusters import hierarchy, kmeans
from lodeset.pipeline.algorithms.clusters.points import Floats, Points, keys_of
from lodeset.pipeline.algorithms.sampling import seeded_order
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome, read_as
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.engines.ray import cores, holding
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import CENTROIDS, FitClustersDetails, FitClustersSpec
from lodeset.pipeline.tables.kept import pool_kept
from lodeset.pipeline.tables.vectors import read_vectors

VERSION = FitClustersSpec.VERSION
STAGE = "fit_clusters"
DRIFT_FILES = 64  # of vectors, some thousand images each, that tell whether centroids still fit
# Below, an actor more costs more than it saves; the cores work inside one.
BYTES_PER_ACTOR = 64 * 2**20


def run(context: Context[FitClustersSpec, None]) -> Outcome:
    dedup = context.inputs["dedup"]
    wanted = pool_kept(context.store, dedup)
    images = len(wanted)
    if images == 0:
        raise LodesetError(f"dedup kept no pool image ({dict(dedup.rows.dropped)}): there is nothing to cluster")
    asked = context.spec.k
    k = (kmeans.choose_k(images),) if asked == "auto" else (asked,) if isinstance(asked, int) else tuple(asked)
    hierarchy.checked(k, images)
    drift = _drift(context, wanted) if context.previous else None
    if context.previous and drift is not None and drift <= context.spec.drift:
        earlier = context.previous
        fitted = read_as(FitClustersDetails, earlier.details)
        details = replace(fitted, drift=round(drift, 4), refitted_at_drift=None, parts_made=0)
        return Outcome(earlier.tables, Rows(taken=images, kept=images), earlier.content, details)
    key = digest(STAGE, VERSION, context.fingerprint)
    parts, new = made(context, STAGE, [(key, k, images)], functools.partial(_fit, context, key))
    files = tuple(parts[0].files[f"centroids-{level}"] for level in range(len(k)))
    return Outcome(
        tables={"centroids": files},
        rows=Rows(taken=images, kept=images),
        content={CENTROIDS: digest(STAGE, VERSION, [file.sha256 for file in files])},
        details=FitClustersDetails(
            k=k[0],
            levels=list(k),
            mean_squared_distance=parts[0].counts["micro_distance"] / 1e6,
            steps=parts[0].counts["steps"],
            parts=1,
            parts_made=len(new),
            refitted_at_drift=None if drift is None else round(drift, 4),
        ),
    )


def _drift(context: Context[FitClustersSpec, None], wanted: set[str]) -> float | None:
    """By what share the mean squared distance to the centroids of the run before has grown since they were fitted, by a seeded
    sample of the files; None where they are of other vectors."""
    store, previous = context.store, context.previous
    assert previous is not None
    fitted = context.inputs["fitted"].fingerprint if "fitted" in context.inputs else None
    if previous.inputs.get("fitted", {}).get("fingerprint") != fitted:
        return None
    files = context.inputs["vectors"].tables["vectors"]
    chosen = seeded_order([file.sha256 for file in files], context.spec.seed)[:DRIFT_FILES]
    centroids = read_centroids(store, previous)
    total, count = 0.0, 0
    for at in chosen:
        ids, matrix = read_vectors(store, [files[at]])
        rows = [row for row, image_id in enumerate(ids) if image_id in wanted]
        if rows:
            total += float(kmeans.assign(matrix[rows], centroids)[1].sum(dtype=np.float64))
            count += len(rows)
    before = read_as(FitClustersDetails, previous.details).mean_squared_distance
    return total / max(1, count) / max(before, 1e-12) - 1


def _fit(context: Context[FitClustersSpec, None], key: str, work: Iterable[tuple[int, ...]]) -> Iterator[Part]:
    started, store, spec = time.perf_counter(), context.store, context.spec
    iterations, seed, spherical = spec.iterations, spec.seed, spec.spherical
    groups = shares(context.inputs["vectors"].tables["vectors"], context.cpus)
    each_cpus = max(1, context.cpus // len(groups))
    make = functools.partial(_points, store, context.inputs["dedup"])
    for k in work:
        with holding(make, groups, cpus_each=each_cpus, address=context.ray_address) as each:
            fit = kmeans.fit_each(each, k[0], iterations, seed, spherical=spherical)
        upper = hierarchy.levels(fit.centroids, k[1:], iterations, spec.resampling or 0, seed, spherical, context.cpus)
        files = {f"centroids-{n}": _written(store, key, n, level) for n, level in enumerate((fit.centroids, *upper))}
        counts = {
            "images": int(fit.counts.sum()),
            "micro_distance": round(fit.distances[-1] * 1e6),
            "steps": len(fit.distances),
        }
        yield store.commit_part(STAGE, key, {}, counts, time.perf_counter() - started, files=files)


def shares(files: Sequence[File], cpus: int) -> list[list[File]]:
    """The files of each actor: as many actors as pay, about the same bytes each. The result of a fit depends on neither."""
    number = max(1, min(cpus, len(files), sum(file.size_bytes for file in files) // BYTES_PER_ACTOR))
    groups: list[list[File]] = [[] for _ in range(number)]
    held = [0] * number
    for file in sorted(files, key=lambda file: (-file.size_bytes, file.path)):
        least = held.index(min(held))
        groups[least].append(file)
        held[least] += file.size_bytes
    return groups


def _points(store: Store, dedup: Artifact, files: Sequence[File]) -> Points:
    wanted = pool_kept(store, dedup)
    ids, matrix = read_vectors(store, files)
    rows = [row for row, image_id in enumerate(ids) if image_id in wanted]
    return Points(matrix[rows], keys_of([ids[row] for row in rows]), cores())


def _written(store: Store, key: str, level: int, centroids: Floats) -> File:
    buffer = io.BytesIO()
    np.save(buffer, centroids)
    relative = f"parts/{STAGE}/{key}/{time.time_ns():x}-centroids-{level}.npy"
    with store.writing(relative) as sink:
        sink.write(buffer.getvalue())
    return File(relative, len(centroids), sink.size_bytes, sink.sha256())


def read_centroids(store: Store, fitted: Artifact) -> Floats:
    """Of the lowest level, float32 [K, D]."""
    return read_levels(store, fitted)[0]


def read_levels(store: Store, fitted: Artifact) -> list[Floats]:
    """Centroids float32 [K, D] of every level, lowest first."""
    levels = []
    for written in fitted.tables["centroids"]:
        with store.opened(written) as file:
            levels.append(np.asarray(np.load(file, allow_pickle=False)))
    return levels
