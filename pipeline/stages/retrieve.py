"""retrieve (Ray + FAISS): what each curated set asks of the pool -> `matches`, `selected` (DINOv2, appendix A.4).

One artifact a curated set holds its `matches`: every pool image that every query finds. Then `all` resolves collisions into
`selected`: within a set, an image that several queries find belongs to the one that finds it most similar. An image that
several sets want has a row in each and one entry in the shards.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import records
from pipeline.algorithms import kmeans, sampling
from pipeline.config import AsIs, Cluster, Sample
from pipeline.dag.fingerprint import digest
from pipeline.dag.stage import Context, Outcome
from pipeline.dag.store import File, Part, Rows, Store
from pipeline.engines.ray import map_with_state
from pipeline.errors import LodesetError
from pipeline.stages import search
from pipeline.stages.embed import read_vectors
from pipeline.stages.fit_clusters import read_centroids
from pipeline.stages.kept import kept_ids, pool_kept, vectors_sorted, with_vector
from pipeline.stages.parts import made

VERSION = 1
STAGE, SEARCH = "retrieve", "retrieve_search"


@dataclass(frozen=True)
class Queries:
    """A run of one set's query images."""

    key: str
    start: int
    stop: int


def run(context: Context) -> Outcome:
    """One curated set."""
    mode: AsIs | Sample | Cluster = context.speed["retrieve"]
    store, name = context.store, context.stage.set
    if isinstance(mode, AsIs):
        return Outcome(tables={"matches": ()}, rows=Rows(taken=0, kept=0), details={"asked": 0, "distinct": 0})
    queries, matrix = read_vectors(store, context.inputs["queries"].tables["vectors"])
    if not queries:
        raise LodesetError(
            f"the curated set `{name}` has no readable image, so there is nothing to look for: check its uri, or remove it"
        )
    order = sorted(range(len(queries)), key=queries.__getitem__)
    queries, matrix = [queries[i] for i in order], matrix[order]
    if isinstance(mode, Sample):
        files = _search(context, queries, mode)
        return _outcome(context, files, asked=mode.k * len(queries))
    return _by_cluster(context, mode, queries, matrix.astype(np.float32))


# -- sample


def _search(context: Context, queries: Sequence[str], mode: Sample) -> list[File]:
    store, name, size, k = context.store, context.stage.set, mode.part_images, mode.k
    dedup = context.inputs["dedup"]
    files = {"pool": context.inputs["vectors"].tables["vectors"]}
    ids = tuple(sorted(with_vector(store, files["pool"], pool_kept(store, dedup))))
    if not ids:
        raise LodesetError(
            f"dedup kept no pool image ({dict(dedup.rows.dropped)}): `{name}` has nothing to retrieve from"
        )
    chosen = search.chosen(context, files, len(queries), len(ids), k, context.config["neighbors"])
    pool = [context.inputs[role].identity("") for role in ("vectors", "dedup")]
    identities = [name, context.inputs["queries"].identity(""), *pool]
    blocks = [
        Queries(
            digest(SEARCH, VERSION, identities, k, chosen.kind, start, size), start, min(start + size, len(queries))
        )
        for start in range(0, len(queries), size)
    ]
    work = [(block.key, block, block.stop - block.start) for block in blocks]
    asking = context.inputs["queries"].tables["vectors"]

    def make(left: Iterable[Queries]) -> Iterator[Part]:
        # Every set that asks the same pool finds the same vectors and index there.
        base = search.prepared(context, chosen, files, ids, digest(search.VERSION, *pool))
        worker = functools.partial(_searcher, store, name, asking, base, ids, k)
        yield from map_with_state(worker, left, cpus=context.cpus, address=context.ray_address)

    parts, _ = made(context, SEARCH, work, make)
    return [p.files["matches"] for p in parts]


def _searcher(
    store: Store, name: str, query_files: Sequence[File], base: search.Base, ids: Sequence[str], k: int
) -> Callable[[Queries], Part]:
    index = search.opened(store, base)
    query_ids, found = read_vectors(store, query_files)
    order = sorted(range(len(query_ids)), key=query_ids.__getitem__)

    def work(block: Queries) -> Part:
        started = time.time()
        asked = order[block.start : block.stop]
        similarity, rows = index.search(found[asked], min(k, len(ids)))
        hit = rows >= 0  # an approximate index may find fewer than k
        table = pa.table(
            {
                "image_id": [ids[row] for row in rows[hit]],
                "set": [name] * int(hit.sum()),
                "mode": ["sample"] * int(hit.sum()),
                "query_id": np.repeat([query_ids[i] for i in asked], hit.sum(axis=1)),
                "similarity": similarity[hit],
                "cluster": pa.nulls(int(hit.sum()), pa.int32()),
            },
            schema=records.MATCHES,
        )
        return store.commit_part(SEARCH, block.key, {"matches": table}, {"images": len(asked)}, time.time() - started)

    return work


# -- cluster


def _by_cluster(context: Context, mode: Cluster, queries: Sequence[str], matrix: sampling.Floats) -> Outcome:
    store, name = context.store, context.stage.set
    centroids = read_centroids(store, context.inputs["centroids"])
    where, _ = kmeans.assign(matrix, centroids)
    matched = sampling.matched_clusters(where, mode.min_matches)
    assigned = store.table(context.inputs["clusters"].tables["clusters"], ["image_id", "cluster"], records.CLUSTERS)
    inside = assigned.filter(pc.is_in(assigned["cluster"], pa.array(matched, pa.int32())))
    members: dict[int, list[str]] = {c: [] for c in matched}
    for image_id, cluster in zip(inside["image_id"].to_pylist(), inside["cluster"].to_pylist(), strict=True):
        members[cluster].append(image_id)
    drawn = sampling.draw({c: sorted(ids) for c, ids in members.items()}, mode.per_cluster, mode.limit, seed=0)
    wanted = {i for ids in drawn.values() for i in ids}
    ids, vectors = vectors_sorted(store, context.inputs["vectors"].tables["vectors"], wanted)
    row_of = {i: n for n, i in enumerate(ids)}
    rows: list[dict[str, object]] = []
    for cluster, chosen in drawn.items():
        asking = np.flatnonzero(where == cluster)
        if not chosen:
            continue
        similarity = vectors[[row_of[i] for i in chosen]].astype(np.float32) @ matrix[asking].T
        best = similarity.argmax(axis=1)
        rows += [
            {
                "image_id": i,
                "set": name,
                "mode": "cluster",
                "query_id": queries[asking[q]],
                "similarity": float(s[q]),
                "cluster": cluster,
            }
            for i, q, s in zip(chosen, best, similarity, strict=True)
        ]
    table = pa.Table.from_pylist(sorted(rows, key=lambda r: str(r["image_id"])), schema=records.MATCHES)
    part = store.commit_part(
        STAGE, digest(STAGE, VERSION, name, context.fingerprint), {"matches": table}, {"images": len(rows)}
    )
    available = sum(map(len, members.values()))
    return Outcome(
        tables={"matches": (part.files["matches"],)},
        rows=Rows(
            taken=available,
            kept=len(rows),
            dropped={"not_drawn": available - len(rows)} if available > len(rows) else {},
        ),
        details={
            "asked": min(mode.limit, mode.per_cluster * len(matched)),
            "distinct": len(rows),
            "clusters": len(matched),
        },
    )


def _outcome(context: Context, files: Sequence[File], asked: int) -> Outcome:
    """Every hit came in; what several queries found counts once."""
    found = context.store.table(files, ["image_id"], records.MATCHES)["image_id"]
    distinct = pc.count_distinct(found).as_py()
    return Outcome(
        tables={"matches": tuple(files)},
        rows=Rows(
            taken=len(found),
            kept=distinct,
            dropped={"collision": len(found) - distinct} if len(found) > distinct else {},
        ),
        details={"asked": asked, "distinct": distinct},
    )


# -- all sets together


def run_all(context: Context) -> Outcome:
    """Every set's matches, each image once a set, and the images that come in as they are."""
    store = context.store
    matches = [
        store.table(a.tables["matches"], None, records.MATCHES)
        for role, a in sorted(context.inputs.items())
        if role.startswith("retrieve:")
    ]
    tables = [_resolved(table) for table in matches]
    kept = kept_ids(store, context.inputs["dedup"])
    for role, artifact in sorted(context.inputs.items()):
        if role.startswith("images:"):
            ids = store.table(artifact.tables["images"], ["image_id"], records.IMAGES)["image_id"].to_pylist()
            tables.append(_as_is(sorted(set(ids) & kept), role.removeprefix("images:")))
    if context.config["everything"]:
        tables.append(_as_is(sorted(pool_kept(store, context.inputs["dedup"])), "pool"))
    table = pa.concat_tables([t.select(records.SELECTED.names) for t in tables], promote_options="none").sort_by(
        [("image_id", "ascending"), ("set", "ascending")]
    )
    distinct = pc.count_distinct(table["image_id"]).as_py()
    part = store.commit_part(STAGE, digest(STAGE, VERSION, "all", context.fingerprint), {"selected": table})
    wanted_twice = table.num_rows - distinct
    return Outcome(
        tables={"selected": (part.files["selected"],)},
        rows=Rows(taken=table.num_rows, kept=distinct, dropped={"several_sets": wanted_twice} if wanted_twice else {}),
        details={"distinct": distinct},
    )


def _resolved(matches: pa.Table) -> pa.Table:
    """One row an image: that of the query which finds it most similar (then the smaller query_id)."""
    ordered = matches.sort_by([("image_id", "ascending"), ("similarity", "descending"), ("query_id", "ascending")])
    ids = np.asarray(ordered["image_id"].to_pylist(), dtype=object)
    first = np.r_[True, ids[1:] != ids[:-1]] if len(ids) else np.zeros(0, bool)
    return ordered.filter(pa.array(first))


def _as_is(ids: Sequence[str], name: str) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"image_id": i, "set": name, "mode": "as_is", "query_id": None, "similarity": None, "cluster": None}
            for i in ids
        ],
        schema=records.SELECTED,
    )
