"""semdedup (Ray): semantic duplicates within clusters are dropped (SemDeDup, 2023).

It comes after `cluster`. What it leaves is what retrieval, balance and the shards see: its tables `duplicates` and `clusters` are those
of dedup and cluster without what it dropped. Clusters are read a range at a time; a part depends on the images of its clusters alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.copies import semantic
from lodeset.pipeline.algorithms.sampling import seeded_keys
from lodeset.pipeline.by_hand import BY_HAND
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.specs import CENTROIDS, KEPT, SemdedupSpec
from lodeset.pipeline.stages import search
from lodeset.pipeline.stages.fit_clusters import read_levels
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.kept import fixed, left_of_pool, rows_of

STAGE, TABLE, REASON = "semdedup", "semantic", "semantic"
PART_IMAGES = 65_536  # of the clusters of a part; a larger cluster is a part of its own

Ids = NDArray[np.bytes_]


@dataclass(frozen=True)
class Range:
    """The images of clusters first..last, sorted by image_id; makes one part."""

    key: str
    ids: Ids
    cluster: NDArray[np.int32]
    first: NDArray[np.bool_]  # kept by hand


def run(context: Context[SemdedupSpec, None]) -> Outcome:
    store, dedup, clusters = context.store, context.inputs["dedup"], context.inputs["clusters"]
    vectors, centroids = context.inputs["vectors"], context.inputs["centroids"]
    ranges = _ranges(context, dedup, clusters, vectors, centroids)
    worker = functools.partial(_worker, store, context.spec, vectors.tables["vectors"], centroids)
    width = 1e-9 * 2 * max(1, sum(file.rows for file in vectors.tables["vectors"]))
    parts, new = made(
        context,
        STAGE,
        [(one.key, one, len(one.ids)) for one in ranges],
        functools.partial(
            map_with_state,
            worker,
            cpus=context.cpus,
            address=context.ray_address,
            seconds=lambda one: 0.1 + width + len(one.ids) * 1e-3,
        ),
    )
    found = store.table([part.files[TABLE] for part in parts], None, records.SEMANTIC)
    judged, left = _judged(store, dedup, found), _left(store, clusters, found)
    part = store.commit_part(
        STAGE, digest(STAGE, SemdedupSpec.VERSION, context.fingerprint), {"duplicates": judged, "clusters": left}
    )
    taken = pc.sum(store.table(dedup.tables["duplicates"], ["kept"])["kept"]).as_py() or 0
    return Outcome(
        tables={
            "duplicates": (part.files["duplicates"],),
            "clusters": (part.files["clusters"],) if left.num_rows else (),
            CENTROIDS: clusters.tables[CENTROIDS],
            TABLE: tuple(one.files[TABLE] for one in parts if one.files[TABLE].rows),
        },
        rows=Rows(
            taken=taken,
            kept=taken - found.num_rows,
            dropped={REASON: found.num_rows} if found.num_rows else {},
        ),
        content={KEPT: digest(STAGE, SemdedupSpec.VERSION, part.files["duplicates"].sha256)},
        details={"parts": len(parts), "parts_made": len(new), "eps": context.spec.eps, "keep": context.spec.keep},
    )


def _ranges(
    context: Context[SemdedupSpec, None], dedup: Artifact, clusters: Artifact, vectors: Artifact, centroids: Artifact
) -> list[Range]:
    """Ranges of clusters, each of about PART_IMAGES images that dedup left."""
    store = context.store
    table = store.table(clusters.tables["clusters"], ["image_id", "cluster"], records.CLUSTERS)
    judged = store.table(dedup.tables["duplicates"], ["image_id", "reason"])
    hand = np.sort(fixed(judged["image_id"].filter(pc.equal(judged["reason"], BY_HAND))))
    left = np.sort(fixed(left_of_pool(store, dedup)))
    ids, cluster = fixed(table["image_id"]), table["cluster"].to_numpy().astype(np.int32)
    there = rows_of(ids, left) >= 0
    ids, cluster = ids[there], cluster[there]
    order = np.lexsort((ids, cluster))
    ids, cluster = ids[order], cluster[order]
    sizes = np.bincount(cluster) if len(cluster) else np.zeros(0, np.int64)
    part = (np.cumsum(sizes) - sizes) // PART_IMAGES  # of each cluster
    of_row = part[cluster] if len(cluster) else part
    made_of = [search.space(vectors), centroids.content[CENTROIDS], context.spec]
    ranges = []
    for number in np.unique(of_row).tolist():
        rows = np.flatnonzero(of_row == number)
        rows = rows[np.argsort(ids[rows])]
        first = rows_of(ids[rows], hand) >= 0
        holds = [ids[rows].tobytes().hex(), cluster[rows].tobytes().hex(), first.tobytes().hex()]
        key = digest(STAGE, SemdedupSpec.VERSION, *made_of, *holds)
        ranges.append(Range(key, ids[rows], cluster[rows], first))
    return ranges


def _worker(store: Store, spec: SemdedupSpec, files: tuple[File, ...], centroids: Artifact) -> Callable[[Range], Part]:
    """Called once in each worker."""
    lowest = read_levels(store, centroids)[0]

    def find(one: Range) -> Part:
        started = time.perf_counter()
        vectors = _vectors(store, files, one.ids)
        keys = seeded_keys(one.ids, spec.seed)
        rows = []
        for cluster in np.unique(one.cluster).tolist():
            own = np.flatnonzero(one.cluster == cluster)
            some, first = vectors[own], one.first[own]
            order = semantic.order_of(some, lowest[cluster].astype(np.float32), spec.keep, keys[own], first)
            found = semantic.duplicates(some, order, spec.eps, first)
            rows += [
                (one.ids[own[row]].decode(), cluster, one.ids[own[found.match[row]]].decode(), found.similarity[row])
                for row in np.flatnonzero(found.dropped).tolist()
            ]
        columns = list(zip(*rows, strict=True)) if rows else [()] * 4
        table = pa.table(dict(zip(records.SEMANTIC.names, columns, strict=True)), schema=records.SEMANTIC)
        counts = {"images": len(one.ids)}
        return store.commit_part(STAGE, one.key, {TABLE: table}, counts, time.perf_counter() - started)

    return find


def _vectors(store: Store, files: tuple[File, ...], ids: Ids) -> NDArray[np.float32]:
    """The vectors [N, D] of these image_ids (sorted), a file at a time."""
    found: NDArray[np.float32] | None = None
    for file in files:
        if not file.rows:
            continue
        table = store.table([file])
        rows = rows_of(fixed(table["image_id"]), ids)
        matrix = table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
        if found is None:
            found = np.zeros((len(ids), matrix.shape[1]), np.float32)
        found[rows[rows >= 0]] = matrix[rows >= 0]
    return np.zeros((0, 1), np.float32) if found is None else found


def _judged(store: Store, dedup: Artifact, found: pa.Table) -> pa.Table:
    """`duplicates` of dedup, with what is dropped here."""
    table = store.table(dedup.tables["duplicates"], None, records.DUPLICATES)
    at = pc.index_in(table["image_id"], found["image_id"].combine_chunks())
    here = pc.is_valid(at)

    def instead(name: str, value: pa.Array | pa.ChunkedArray | pa.Scalar) -> None:
        nonlocal table
        place = table.column_names.index(name)
        column = pc.if_else(here, value, table[name]).cast(table.schema.field(name).type)
        table = table.set_column(place, name, column)

    instead("kept", pa.scalar(False))
    instead("reason", pa.scalar(REASON))
    instead("matched_id", found["matched_id"].take(at))
    instead("similarity", found["similarity"].take(at))
    return table.cast(records.DUPLICATES)


def _left(store: Store, clusters: Artifact, found: pa.Table) -> pa.Table:
    """`clusters` without what is dropped here."""
    table = store.table(clusters.tables["clusters"], None, records.CLUSTERS)
    return table.filter(pc.invert(pc.is_in(table["image_id"], found["image_id"].combine_chunks())))
