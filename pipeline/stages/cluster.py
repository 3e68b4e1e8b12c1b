"""cluster (Ray): vectors of the kept pool + centroids -> `clusters`. A part a file of vectors, made anew only where the centroids
or what is kept of it changed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from lodeset.pipeline.algorithms.clusters import hierarchy, kmeans
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome, read_as
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.specs import CENTROIDS, ClusterDetails, ClusterSpec, FitClustersDetails
from lodeset.pipeline.stages.fit_clusters import read_levels
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.kept import pool_kept
from lodeset.pipeline.tables.vectors import read_vectors

VERSION = ClusterSpec.VERSION
STAGE = "cluster"


def run(context: Context[ClusterSpec, None]) -> Outcome:
    vectors, dedup, fitted = (context.inputs[role] for role in ("vectors", "dedup", "centroids"))
    wanted, work = pool_kept(context.store, dedup), []
    for file in vectors.tables["vectors"]:
        ids = context.store.table([file], ["image_id"])["image_id"].to_pylist()
        kept = digest([image_id for image_id in ids if image_id in wanted])
        key = digest(STAGE, VERSION, file.sha256, fitted.content[CENTROIDS], kept)
        work.append((key, (key, file), file.rows))
    make = functools.partial(_assigning, context.store, fitted, dedup)
    parts, new = made(
        context,
        STAGE,
        work,
        functools.partial(
            map_with_state,
            make,
            cpus=context.cpus,
            address=context.ray_address,
            seconds=lambda item: item[1].rows * 1e-4,
        ),
    )
    count, k = sum(p.files["clusters"].rows for p in parts), read_as(FitClustersDetails, fitted.details).k
    sizes = np.bincount(
        context.store.table([p.files["clusters"] for p in parts], ["cluster"], records.CLUSTERS)["cluster"].to_numpy(),
        minlength=1,
    )
    return Outcome(
        tables={
            "clusters": tuple(p.files["clusters"] for p in parts if p.files["clusters"].rows),
            "centroids": fitted.tables["centroids"],
        },
        rows=Rows(taken=count, kept=count),
        details=ClusterDetails(
            k=k,
            largest=int(sizes.max()),
            empty=int(k - (sizes > 0).sum()),
            parts=len(parts),
            parts_made=len(new),
        ),
    )


def _assigning(store: Store, fitted: Artifact, dedup: Artifact) -> Callable[[tuple[str, File]], Part]:
    """Called once in each worker: loads the centroids, returns what makes one part."""
    levels = read_levels(store, fitted)
    parents = hierarchy.parents(levels)
    wanted = pool_kept(store, dedup)

    def assign(item: tuple[str, File]) -> Part:
        key, file = item
        started = time.perf_counter()
        ids, matrix = read_vectors(store, [file])
        rows = [row for row, image_id in enumerate(ids) if image_id in wanted]
        nearest, _ = kmeans.assign(matrix[rows], levels[0])
        paths = pa.array(list(hierarchy.paths(nearest, parents)), pa.list_(pa.int32()))
        table = pa.table(
            {"image_id": [ids[row] for row in rows], "cluster": nearest, "path": paths}, schema=records.CLUSTERS
        )
        return store.commit_part(STAGE, key, {"clusters": table}, {"images": len(ids)}, time.perf_counter() - started)

    return assign
