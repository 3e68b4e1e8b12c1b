"""retrieve (Ray + FAISS): what each curated set asks of the pool -> `matches`, `selected` (DINOv2, appendix A.4).

One artifact a curated set holds its `matches`: every pool image that every query finds. Then `all` resolves collisions into
`selected`: within a set, an image that several queries find belongs to the one that finds it most similar. An image that
several sets want has a row in each, counts in each one's limit, and has one entry in the shards (`selection.shared: each`),
or it has the row of one set alone (`best`); docs/decisions/0010.

A set may consist of images of the pool that a list names (`pool_ids`). Its queries are the pool's own vectors, and no query counts as
a hit of itself. With `include`, those of its images that dedup kept are selected themselves (table `listed`, mode `by_hand`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lodeset.pipeline.algorithms import sampling
from lodeset.pipeline.algorithms.clusters import kmeans
from lodeset.pipeline.by_hand import BY_HAND, IdList
from lodeset.pipeline.config import AsIs, Cluster, Sample
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import Block, blocks, made
from lodeset.pipeline.dag.stage import Context, Outcome, as_mapping, read_as
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import RetrieveDetails, RetrieveRuntime, RetrieveSpec, SelectDetails, SelectSpec
from lodeset.pipeline.stages import search
from lodeset.pipeline.stages.fit_clusters import read_centroids
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.forgotten import forgotten
from lodeset.pipeline.tables.kept import fixed, left_of_all, left_of_pool, pool_kept, with_vector
from lodeset.pipeline.tables.vectors import read_vectors

VERSION = RetrieveSpec.VERSION
STAGE, SEARCH, QUERIES = "retrieve", "retrieve_search", "retrieve_queries"
OWN = pa.array(["as_is", BY_HAND])  # modes of a set's own images


@dataclass(frozen=True)
class Queries:
    """The vectors that a set asks with; `of_pool`: they are those of images of the pool, which are no hits of themselves."""

    files: tuple[File, ...]
    identity: str
    of_pool: bool = False

    @property
    def images(self) -> int:
        return sum(file.rows for file in self.files)


def run(context: Context[RetrieveSpec, RetrieveRuntime]) -> Outcome:
    """One curated set."""
    listed = context.runtime.pool_ids
    if listed is not None:
        return _of_pool(context, listed)
    given = context.inputs["queries"]
    queries = Queries(given.tables["vectors"], given.identity(""))
    if not queries.images:
        raise LodesetError(
            f"the curated set `{context.stage.set}` has no readable image, so there is nothing to look for: check its uri, or remove it"
        )
    return _retrieved(context, queries)


def _retrieved(context: Context[RetrieveSpec, RetrieveRuntime], queries: Queries) -> Outcome:
    mode, dedup = context.spec.mode, context.inputs["dedup"]
    if isinstance(mode, AsIs):
        return Outcome(tables={"matches": ()}, rows=Rows(taken=0, kept=0), details=as_mapping(counted(0, 0, 0)))
    pool = len(left_of_pool(context.store, dedup))
    if not pool:
        raise LodesetError(
            f"dedup kept no pool image ({dict(dedup.rows.dropped)}): `{context.stage.set}` has nothing to retrieve from"
        )
    if isinstance(mode, Sample):
        return _by_sample(context, mode, queries, pool)
    return _by_cluster(context, mode, queries)


# -- a set of images of the pool


def _of_pool(context: Context[RetrieveSpec, RetrieveRuntime], listed: IdList) -> Outcome:
    store, name = context.store, context.stage.set
    queries = _queries_of_pool(context, listed)
    if not queries.images:
        raise LodesetError(
            f"the curated set `{name}`: none of the {len(listed.ids):,} image_ids of {listed.name} is an image of the pool that was "
            "embedded, so there is nothing to look for: check the list, or remove the set"
        )
    found = _retrieved(context, queries)
    there = store.table(queries.files, ["image_id"], records.vectors(1))["image_id"]
    kept = there.filter(pc.is_in(there, left_of_all(store, context.inputs["dedup"]).combine_chunks()))
    tables = dict(found.tables)
    if context.spec.include:
        key = digest(STAGE, VERSION, name, context.fingerprint, "listed")
        part = store.commit_part(STAGE, key, {"listed": _rows(kept, name, BY_HAND)})
        tables["listed"] = (part.files["listed"],)
    warnings = [*(found.details.get("warnings") or ()), *_told_of(store, name, listed, there, kept)]
    details = {**found.details, "queries": queries.images, **({"warnings": warnings} if warnings else {})}
    return replace(found, tables=tables, details=details)


def _queries_of_pool(context: Context[RetrieveSpec, RetrieveRuntime], listed: IdList) -> Queries:
    """The pool's vectors of the listed images, in a file of their own, so that no worker has to read all of the pool's."""
    store, vectors = context.store, context.inputs["vectors"]
    identity = digest(QUERIES, VERSION, vectors.identity(""), context.spec.pool_ids)
    part = store.part(QUERIES, identity)
    if part is None:
        wanted, tables = pa.array(listed.ids, pa.string()), []
        for file in vectors.tables["vectors"]:
            table = store.table([file])
            tables.append(table.filter(pc.is_in(table["image_id"], wanted)))
        found = pa.concat_tables(tables) if tables else records.vectors(1).empty_table()
        part = store.commit_part(QUERIES, identity, {"vectors": found.sort_by("image_id")}, {"images": found.num_rows})
    return Queries((part.files["vectors"],), identity, of_pool=True)


def _told_of(store: Store, name: str, listed: IdList, there: pa.ChunkedArray, kept: pa.ChunkedArray) -> Iterator[str]:
    """What to tell of a list: image_ids that the pool does not hold, and images that were dropped."""
    missing = set(listed.ids) - set(there.to_pylist())
    if missing:
        gone = len(missing & forgotten(store))
        why = f" ({gone:,} of them were taken out by `lodeset forget`)" if gone else ""
        yield (
            f"{len(missing):,} of the {len(listed.ids):,} image_ids of {listed.name} are not in the pool, or have no vector{why}: "
            f"`{name}` goes without them"
        )
    dropped = len(there) - len(kept)
    if dropped:
        yield (
            f"{dropped:,} of the {len(listed.ids):,} images of {listed.name} were dropped by a filter or by dedup: `{name}` looks for "
            "images like them, but they cannot be selected themselves (`lodeset trace` tells why; by_hand.keep keeps them)"
        )


def counted(
    asked: int, retrieved: int, distinct: int, capped: int = 0, warnings: Sequence[str] = ()
) -> RetrieveDetails:
    """What every mode says of a set."""
    return RetrieveDetails(
        asked=asked,
        retrieved=retrieved,
        distinct=distinct,
        collisions=retrieved - capped - distinct,
        short=asked - retrieved,
        capped=capped,
        warnings=list(warnings) or None,
    )


# -- sample


def _by_sample(context: Context, mode: Sample, queries: Queries, pool: int) -> Outcome:
    """Every hit comes in; what several queries find counts once."""
    files = _search(context, queries, mode)
    found = context.store.table(files, ["image_id"], records.MATCHES)["image_id"]
    distinct = pc.count_distinct(found).as_py()
    warnings = []
    if mode.k > pool:
        warnings.append(
            f"k = {mode.k} is more than the {pool} pool images that dedup kept, so every query found all of them: choose a smaller k"
        )
    return Outcome(
        tables={"matches": tuple(files)},
        rows=Rows(
            taken=len(found),
            kept=distinct,
            dropped={"collision": len(found) - distinct} if len(found) > distinct else {},
        ),
        details=as_mapping(counted(mode.k * queries.images, len(found), distinct, warnings=warnings)),
    )


def _search(context: Context, queries: Queries, mode: Sample) -> list[File]:
    store, name, size, k = context.store, context.stage.set, mode.part_images, mode.k
    files = {"pool": context.inputs["vectors"].tables["vectors"]}
    ids = tuple(sorted(with_vector(store, files["pool"], pool_kept(store, context.inputs["dedup"]))))
    chosen = search.chosen(context, files, queries.images, len(ids), k, context.spec.neighbors)
    pool = [context.inputs[role].identity("") for role in ("vectors", "dedup")]
    work = blocks(queries.images, size, SEARCH, VERSION, [name, queries.identity, *pool], k, chosen.kind)

    def make(left: Iterable[Block]) -> Iterator[Part]:
        # Every set that asks the same pool finds the same vectors and index there.
        base = search.prepared(context, chosen, files, ids, digest(search.VERSION, *pool))
        worker = functools.partial(_searcher, store, name, queries, base, ids, k)
        seconds = functools.partial(search.seconds, len(ids))
        yield from map_with_state(worker, left, cpus=context.cpus, address=context.ray_address, seconds=seconds)

    parts, _ = made(context, SEARCH, work, make)
    return [p.files["matches"] for p in parts]


def _searcher(
    store: Store, name: str, queries: Queries, base: search.Base, ids: Sequence[str], k: int
) -> Callable[[Block], Part]:
    index, pool_ids = search.opened(store, base), pa.array(ids, pa.string())
    query_ids, found = read_vectors(store, queries.files)
    order = sorted(range(len(query_ids)), key=query_ids.__getitem__)

    def work(block: Block) -> Part:
        started = time.perf_counter()
        asked = order[block.start : block.stop]
        similarity, rows = index.search(found[asked], min(k + queries.of_pool, len(ids)))
        hit = rows >= 0  # an approximate index may find fewer than k
        if queries.of_pool:
            own = pc.index_in(pa.array([query_ids[i] for i in asked], pa.string()), value_set=pool_ids)
            hit &= rows != pc.fill_null(own, -1).to_numpy()[:, None]
            hit &= np.cumsum(hit, axis=1) <= k
        asking = pa.array(query_ids[i] for i in asked).take(pa.array(np.repeat(np.arange(len(asked)), hit.sum(axis=1))))
        table = _rows(pool_ids.take(pa.array(rows[hit])), name, "sample", asking, similarity[hit])
        return store.commit_part(
            SEARCH, block.key, {"matches": table}, {"images": len(asked)}, time.perf_counter() - started
        )

    return work


# -- cluster


def _by_cluster(context: Context, mode: Cluster, queries: Queries) -> Outcome:
    store, name = context.store, context.stage.set
    asking_ids, matrix = read_vectors(store, queries.files)
    order = sorted(range(len(asking_ids)), key=asking_ids.__getitem__)
    query_ids, matrix = pa.array(asking_ids, pa.string()).take(pa.array(order)), matrix[order]
    where, _ = kmeans.assign(matrix.astype(np.float32), read_centroids(store, context.inputs["centroids"]))
    matched = sampling.matched_clusters(where, mode.min_matches)
    inside = _members(store, context.inputs["clusters"].tables["clusters"], matched)
    own = query_ids if queries.of_pool else None
    if own is not None:
        # Nothing but itself asks for the only query of a cluster.
        alone = own.filter(pa.array(np.bincount(where)[where] == 1))
        inside = inside.filter(pc.invert(pc.is_in(inside["image_id"], alone)))
    drawn = sampling.draw(inside["cluster"].to_numpy(), fixed(inside["image_id"]), mode.per_cluster, mode.limit, seed=0)
    chosen = inside.take(pa.array(drawn.rows)).sort_by("image_id")
    clusters = chosen["cluster"].to_numpy()
    asking, similarity = _most_similar_queries(
        store, context.inputs["vectors"].tables["vectors"], chosen["image_id"], clusters, matrix, where, own
    )
    table = _rows(chosen["image_id"], name, "cluster", query_ids.take(pa.array(asking)), similarity, clusters)
    part = store.commit_part(
        STAGE, digest(STAGE, VERSION, name, context.fingerprint), {"matches": table}, {"images": table.num_rows}
    )
    capped, beyond = drawn.offered - table.num_rows, inside.num_rows - drawn.offered
    warnings = []
    if not len(matched):
        warnings.append(
            f"no cluster holds {mode.min_matches} of its {len(query_ids)} images (min_matches), so it retrieved nothing: "
            "choose a smaller min_matches or cluster.k, or `mode: sample`"
        )
    return Outcome(
        tables={"matches": (part.files["matches"],)},
        rows=Rows(
            taken=inside.num_rows,
            kept=table.num_rows,
            dropped={reason: n for reason, n in (("not_drawn", beyond), ("capped", capped)) if n},
        ),
        details={
            **as_mapping(counted(mode.per_cluster * len(matched), drawn.offered, table.num_rows, capped, warnings)),
            "clusters": len(matched),
        },
    )


def _members(store: Store, files: Sequence[File], matched: NDArray[np.int32]) -> pa.Table:
    """image_id and cluster of the pool images in these clusters."""
    tables = [records.CLUSTERS.empty_table().select(["image_id", "cluster"])]
    for file in files:
        table = store.table([file], ["image_id", "cluster"])
        tables.append(table.filter(pc.is_in(table["cluster"], pa.array(matched, pa.int32()))))
    return pa.concat_tables(tables)


def _most_similar_queries(
    store: Store,
    files: Sequence[File],
    ids: pa.ChunkedArray,
    clusters: NDArray[np.int32],
    queries: NDArray[np.float16],
    where: NDArray[np.int32],
    own: pa.Array | None,
) -> tuple[NDArray[np.int64], sampling.Floats]:
    """For each drawn image, which query of its cluster is most similar to it (the first of equal ones), and how similar; where the
    queries are images of the pool (`own`, their ids), which one beside itself.

    Reads the pool's vectors a file at a time. In 64 bits these cosines are exact (L2-normalised numbers of 16 bits: the
    products are multiples of 2^-48 and their sums are below 2), so they do not depend on how the vectors lie in files.
    """
    best, similarity = np.full(len(ids), -1, np.int64), np.zeros(len(ids), np.float32)
    itself = None if own is None else pc.fill_null(pc.index_in(ids, value_set=own), -1).to_numpy()
    for file in files:
        file_ids, vectors = read_vectors(store, [file])
        at = pc.fill_null(pc.index_in(pa.array(file_ids, pa.string()), value_set=ids), -1).to_numpy()
        rows = np.flatnonzero(at >= 0)
        at = at[rows]
        for cluster in np.unique(clusters[at]):
            asking = np.flatnonzero(where == cluster)
            mine = clusters[at] == cluster
            cosines = vectors[rows[mine]].astype(np.float64) @ queries[asking].astype(np.float64).T
            if itself is not None:
                cosines[itself[at[mine]][:, None] == asking] = -np.inf
            best[at[mine]] = asking[cosines.argmax(axis=1)]
            similarity[at[mine]] = cosines.max(axis=1)
    return best, similarity


# -- all sets together


def run_all(context: Context[SelectSpec, None]) -> Outcome:
    """Every set's matches, each image once a set, and the images that come in as they are."""
    store, dedup = context.store, context.inputs["dedup"]
    inputs = sorted(context.inputs.items())
    retrieved = [artifact for role, artifact in inputs if role.startswith("retrieve:")]
    tables = [_wanted(store, artifact) for artifact in retrieved]
    for role, artifact in inputs:
        if role.startswith("images:"):
            ids = pc.unique(store.table(artifact.tables["images"], ["image_id"], records.IMAGES)["image_id"])
            tables.append(_rows(ids.filter(pc.is_in(ids, left_of_all(store, dedup))), role.removeprefix("images:")))
    if context.spec.everything:
        tables.append(_rows(left_of_pool(store, dedup), "pool"))
    wanted = pa.concat_tables([t.select(records.SELECTED.names) for t in tables], promote_options="none").sort_by(
        [("image_id", "ascending"), ("set", "ascending")]
    )
    several = _wanted_by_several(wanted["image_id"])
    selected = _best(wanted) if context.spec.shared == "best" else wanted
    distinct = pc.count_distinct(wanted["image_id"]).as_py()
    part = store.commit_part(STAGE, digest(STAGE, VERSION, "all", context.fingerprint), {"selected": selected})
    twice = wanted.num_rows - distinct
    details = [read_as(RetrieveDetails, artifact.details) for artifact in retrieved]
    sets = sorted({*pc.unique(wanted["set"]).to_pylist(), *context.spec.sets})
    return Outcome(
        tables={"selected": (part.files["selected"],)},
        rows=Rows(taken=wanted.num_rows, kept=distinct, dropped={"several_sets": twice} if twice else {}),
        details=SelectDetails(
            distinct=distinct,
            asked=sum(of_set.asked for of_set in details),
            retrieved=sum(of_set.retrieved for of_set in details),
            collisions=sum(of_set.collisions for of_set in details),
            short=sum(of_set.short for of_set in details),
            capped=sum(of_set.capped for of_set in details),
            shared=pc.count_distinct(wanted["image_id"].filter(several)).as_py(),
            shared_by_set=_by_set(wanted.filter(several), sets),
            as_is_by_set=_by_set(wanted.filter(pc.is_in(wanted["mode"], OWN)), sets),
        ),
    )


def _wanted(store: Store, artifact: Artifact) -> pa.Table:
    """What one set wants of the pool: the images that a list names, and one row for every other image that it finds."""
    found = _resolved(store.table(artifact.tables["matches"], None, records.MATCHES))
    if "listed" not in artifact.tables:
        return found
    listed = store.table(artifact.tables["listed"], None, records.SELECTED)
    others = found.filter(pc.invert(pc.is_in(found["image_id"], listed["image_id"].combine_chunks())))
    return pa.concat_tables([listed, others.select(records.SELECTED.names)])


def _by_set(rows: pa.Table, sets: Sequence[str]) -> dict[str, int]:
    counts = {c["values"]: c["counts"] for c in pc.value_counts(rows["set"]).to_pylist()}
    return {name: counts.get(name, 0) for name in sets}


def _resolved(matches: pa.Table) -> pa.Table:
    """One row an image: that of the query which finds it most similar (then the smaller query_id)."""
    return _first(matches.sort_by([("image_id", "ascending"), ("similarity", "descending"), ("query_id", "ascending")]))


def _best(wanted: pa.Table) -> pa.Table:
    """One row an image: of a set that includes it, else of the one that finds it most similar, then the smaller name."""
    included = pc.is_in(wanted["mode"], OWN).cast(pa.int8())
    order = [("image_id", "ascending"), ("included", "descending"), ("similarity", "descending"), ("set", "ascending")]
    return _first(wanted.append_column("included", included).sort_by(order)).select(records.SELECTED.names)


def _first(ordered: pa.Table) -> pa.Table:
    """The first row of each image_id."""
    return ordered.filter(
        pa.array(np.r_[np.ones(min(1, ordered.num_rows), bool), ~_like_the_one_before(ordered["image_id"])])
    )


def _wanted_by_several(ids: pa.ChunkedArray) -> pa.Array:
    """Which rows share their image_id with another one; `ids` are sorted."""
    same = _like_the_one_before(ids)
    return pa.array(np.r_[False, same] | np.r_[same, False]) if len(ids) else pa.array([], pa.bool_())


def _like_the_one_before(ids: pa.ChunkedArray) -> NDArray[np.bool_]:
    """bool [N - 1]: whether rows 1, 2, ... have the id of the row before."""
    return np.asarray(pc.equal(ids.slice(1), ids.slice(0, max(0, len(ids) - 1))).to_numpy(), dtype=bool)


def _rows(
    ids: pa.Array | pa.ChunkedArray,
    name: str,
    mode: str = "as_is",
    queries: pa.Array | None = None,
    similarity: sampling.Floats | None = None,
    clusters: NDArray[np.int32] | None = None,
) -> pa.Table:
    """Rows of `matches` or `selected` that one set wants in one way."""
    count = len(ids)
    return pa.table(
        {
            "image_id": ids,
            "set": pa.repeat(name, count),
            "mode": pa.repeat(mode, count),
            "query_id": pa.nulls(count, pa.string()) if queries is None else queries,
            "similarity": pa.nulls(count, pa.float32()) if similarity is None else similarity,
            "cluster": pa.nulls(count, pa.int32()) if clusters is None else clusters,
        },
        schema=records.SELECTED,
    )
