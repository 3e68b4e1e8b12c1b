"""What curated sets get from a planted pool, against plain NumPy: no engine, tables made by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from inline import artifact, listed, without_engine

from lodeset.pipeline.algorithms.clusters import kmeans
from lodeset.pipeline.by_hand import IdList, identity_of
from lodeset.pipeline.config import AsIs, Cluster, Sample
from lodeset.pipeline.dag.stage import Context, Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import RetrieveRuntime, RetrieveSpec, SelectSpec
from lodeset.pipeline.stages import retrieve
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.vectors import normalised, vector_table

POOL, KEPT, QUERIES, WIDTH, K = 500, 400, 60, 8, 12


def name_of(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}"


@dataclass(frozen=True)
class Planted:
    """A pool whose rows lie in three files in an order of their own; the last POOL - KEPT images were dropped by dedup."""

    store: Store
    inputs: dict[str, Artifact]
    pool_ids: list[str]
    pool: np.ndarray
    query_ids: list[str]
    queries: np.ndarray
    centroids: np.ndarray

    def run(
        self, mode: Any, set_: str = "flowers", listed: IdList | None = None, include: bool = False
    ) -> tuple[Artifact, list[dict[str, Any]]]:
        of_list = {} if listed is None else {"pool_ids": identity_of([listed]), "include": include}
        spec = RetrieveSpec(mode=mode, neighbors="auto", **of_list)
        stage = Stage("retrieve", set_, 2, "ray", retrieve.run, spec, runtime=RetrieveRuntime(pool_ids=listed))
        fingerprint = f"{mode!r}{of_list}".encode().hex()[-200:]
        done = artifact("retrieve", set_, retrieve.run(Context(self.store, stage, fingerprint, self.inputs, 1, ignore)))
        return done, self.store.table(done.tables["matches"], None, records.MATCHES).to_pylist()

    @property
    def kept(self) -> list[int]:
        return sorted(range(KEPT), key=self.pool_ids.__getitem__)


def ignore(progress: object) -> None: ...


def by_hand(store: Store, stage: str, tables: dict[str, list[pa.Table]], details: Any = None) -> Artifact:
    files: dict[str, tuple[File, ...]] = {}
    for table, parts in tables.items():
        files[table] = tuple(
            store.commit_part(stage, f"{table}-{n}", {table: part}).files[table] for n, part in enumerate(parts)
        )
    return artifact(stage, "x", Outcome(files, Rows(1, 1), details=details or {}))


def planted(
    folder: Path, patch: pytest.MonkeyPatch, order: int = 0, queries: int = QUERIES, pool: int = POOL
) -> Planted:
    without_engine(retrieve, patch)
    rng = np.random.default_rng(5)
    vectors = normalised(rng.normal(size=(pool, WIDTH)).astype(np.float32))
    asking = normalised(rng.normal(size=(queries, WIDTH)).astype(np.float32) + 0.7)
    centroids = vectors[:K].astype(np.float32)
    ids, query_ids = [name_of(n) for n in range(pool)], [name_of(10_000 + n) for n in range(queries)]
    store = Store(str(folder / f"store-{order}"))
    rows = np.random.default_rng(order).permutation(pool)
    parts = np.array_split(rows, 3 + order)
    where, _ = kmeans.assign(vectors.astype(np.float32), centroids)
    duplicates = [(ids[n], ids[n], n < KEPT, "unique" if n < KEPT else "near", None, None) for n in rows]
    clusters = [[(ids[n], int(where[n]), [int(where[n])]) for n in part if n < KEPT] for part in parts]
    with store.writing("centroids.npy") as sink:
        np.save(sink, centroids)
    inputs = {
        "queries": by_hand(store, "embed-q", {"vectors": [vector_table(query_ids, asking)]}),
        "vectors": by_hand(store, "embed", {"vectors": [vector_table([ids[n] for n in p], vectors[p]) for p in parts]}),
        "dedup": by_hand(store, "dedup", {"duplicates": [table(records.DUPLICATES, duplicates)]}),
        "clusters": by_hand(store, "cluster", {"clusters": [table(records.CLUSTERS, part) for part in clusters]}),
        "centroids": artifact("fit", "x", Outcome({"centroids": (listed(store, "centroids.npy", K),)}, Rows(1, 1))),
    }
    return Planted(store, inputs, ids, vectors.astype(np.float64), query_ids, asking.astype(np.float64), centroids)


def table(schema: pa.Schema, rows: list[tuple[Any, ...]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)


def adds_up(details: Any) -> None:
    assert details["asked"] == details["retrieved"] + details["short"]
    assert details["retrieved"] == details["distinct"] + details["collisions"] + details["capped"]


# -- sample


@pytest.mark.parametrize("block", [7, 1_000])
def test_a_sample_is_the_k_nearest_of_every_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    world = planted(tmp_path, monkeypatch)
    done, matches = world.run(Sample(mode="sample", k=5, part_images=block))
    cosines = world.queries @ world.pool[:KEPT].T
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :5]
    expected = {(world.query_ids[q], world.pool_ids[n]): cosines[q, n] for q in range(QUERIES) for n in nearest[q]}
    found = {(row["query_id"], row["image_id"]): row["similarity"] for row in matches}
    assert found.keys() == expected.keys() and len(matches) == 5 * QUERIES
    assert all(found[pair] == pytest.approx(expected[pair], abs=1e-5) for pair in expected)
    distinct = len({n for row in nearest for n in row})
    assert distinct < 5 * QUERIES
    assert done.details == {
        "asked": 5 * QUERIES, "retrieved": 5 * QUERIES, "distinct": distinct, "collisions": 5 * QUERIES - distinct,
        "short": 0, "capped": 0,
    }  # fmt: skip
    assert (done.rows.kept, done.rows.dropped) == (distinct, {"collision": 5 * QUERIES - distinct})


def test_more_than_the_pool_holds_is_told_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = planted(tmp_path, monkeypatch, queries=3)
    done, matches = world.run(Sample(mode="sample", k=KEPT + 50))
    adds_up(done.details)
    assert len(matches) == 3 * KEPT and {row["image_id"] for row in matches} == set(world.pool_ids[:KEPT])
    assert (done.details["asked"], done.details["short"], done.details["collisions"]) == (3 * KEPT + 150, 150, 2 * KEPT)
    assert done.details["warnings"][0].startswith(f"k = {KEPT + 50} is more than the {KEPT} pool images")


# -- cluster


def expected_clusters(world: Planted, mode: Cluster) -> tuple[dict[int, set[str]], np.ndarray]:
    """The members of each matching cluster, and the cluster of each query, by plain distances."""
    centroids = world.centroids.astype(np.float64)

    def nearest(points: np.ndarray) -> np.ndarray:
        return ((points[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)

    where, mine = nearest(world.queries), nearest(world.pool[:KEPT])
    matched = [c for c in range(K) if (where == c).sum() >= mode.min_matches]
    return {c: {world.pool_ids[n] for n in np.flatnonzero(mine == c)} for c in matched}, where


@pytest.mark.parametrize(("per_cluster", "limit"), [(40, 10_000), (10_000, 10_000), (40, 37), (10_000, 101)])
def test_clusters_give_what_they_hold_up_to_both_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_cluster: int, limit: int
) -> None:
    world = planted(tmp_path, monkeypatch)
    mode = Cluster(mode="cluster", per_cluster=per_cluster, min_matches=4, limit=limit)
    done, matches = world.run(mode)
    members, where = expected_clusters(world, mode)
    sizes = [len(ids) for ids in members.values()]
    assert 2 <= len(sizes) < K and min(sizes) < 40 < max(sizes)
    offered = {c: min(per_cluster, len(ids)) for c, ids in members.items()}
    total = sum(offered.values())
    got = {c: {row["image_id"] for row in matches if row["cluster"] == c} for c in members}
    assert sum(map(len, got.values())) == len(matches) == min(total, limit)
    for c, ids in got.items():
        assert ids <= members[c]
        assert len(ids) == offered[c] if total <= limit else abs(len(ids) - offered[c] * limit / total) < 1
    adds_up(done.details)
    assert done.details["retrieved"] == total and done.details["capped"] == max(0, total - limit)
    assert done.details["asked"] == per_cluster * len(members) and done.details["collisions"] == 0
    assert done.rows.taken == sum(map(len, members.values()))
    row_of = {image_id: n for n, image_id in enumerate(world.pool_ids)}
    for row in matches:
        asking = np.flatnonzero(where == row["cluster"])
        cosines = world.queries[asking] @ world.pool[row_of[row["image_id"]]]
        assert row["similarity"] == np.float32(cosines.max())
        assert row["query_id"] == world.query_ids[asking[cosines.argmax()]]


def test_a_cluster_needs_min_matches_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = planted(tmp_path, monkeypatch)
    for least in (1, 4, 9):
        mode = Cluster(mode="cluster", min_matches=least)
        done, matches = world.run(mode)
        members, _ = expected_clusters(world, mode)
        assert {row["image_id"] for row in matches} == {i for ids in members.values() for i in ids}
        assert done.details["clusters"] == len(members)
    done, matches = world.run(Cluster(mode="cluster", min_matches=QUERIES + 1))
    assert not matches and done.rows == Rows(0, 0)
    assert done.details["warnings"][0].startswith(f"no cluster holds {QUERIES + 1} of its {QUERIES} images")


def test_draws_do_not_depend_on_how_the_pool_lies_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Cluster(mode="cluster", per_cluster=40, limit=60)
    results = [planted(tmp_path, monkeypatch, order).run(mode) for order in range(3)]
    assert results[0][1] == results[1][1] == results[2][1] and len(results[0][1]) == 60
    assert results[0][0].tables["matches"][0].sha256 == results[1][0].tables["matches"][0].sha256


# -- a set of images of the pool


def listed_of(world: Planted, numbers: list[int], *more: str) -> IdList:
    return IdList(
        "curated.0.pool_ids", "lists/birds.txt", tuple(sorted([*(world.pool_ids[n] for n in numbers), *more]))
    )


def asks_with(world: Planted, numbers: list[int]) -> None:
    """The same images as a source of their own."""
    ids = [world.pool_ids[n] for n in numbers]
    vectors = vector_table(ids, world.pool[numbers].astype(np.float16))
    world.inputs["queries"] = by_hand(world.store, f"embed-{len(numbers)}", {"vectors": [vectors]})


LISTED = [*range(0, KEPT, 11), KEPT, KEPT + 1]  # the last two were dropped by dedup


@pytest.mark.parametrize("block", [7, 1_000])
def test_listed_images_find_what_the_same_images_of_a_source_find_except_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    world = planted(tmp_path, monkeypatch)
    done, matches = world.run(Sample(mode="sample", k=5, part_images=block), listed=listed_of(world, LISTED))
    asks_with(world, LISTED)
    _, of_source = world.run(Sample(mode="sample", k=6, part_images=block))
    expected: dict[str, list[str]] = {world.pool_ids[n]: [] for n in LISTED}
    for row in sorted(of_source, key=lambda row: -row["similarity"]):
        if row["image_id"] != row["query_id"] and len(expected[row["query_id"]]) < 5:
            expected[row["query_id"]].append(row["image_id"])
    found = {query: {row["image_id"] for row in matches if row["query_id"] == query} for query in expected}
    assert found == {query: set(ids) for query, ids in expected.items()}
    assert len(matches) == 5 * len(LISTED) == done.details["asked"] and done.details["queries"] == len(LISTED)
    adds_up(done.details)
    assert "listed" not in done.tables
    assert done.details["warnings"] == [
        f"2 of the {len(LISTED)} images of birds.txt were dropped by a filter or by dedup: `flowers` looks for images like them, but "
        "they cannot be selected themselves (`lodeset trace` tells why; by_hand.keep keeps them)"
    ]


def test_clusters_of_listed_images_are_those_of_the_same_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = planted(tmp_path, monkeypatch)
    mode = Cluster(mode="cluster", min_matches=2)
    _, matches = world.run(mode, listed=listed_of(world, LISTED))
    lone = Cluster(mode="cluster", min_matches=1)
    few = [0, KEPT]
    _, of_few = world.run(lone, listed=listed_of(world, few))
    asks_with(world, LISTED)
    _, of_source = world.run(mode)
    assert {(row["image_id"], row["cluster"]) for row in matches} == {(r["image_id"], r["cluster"]) for r in of_source}
    assert len(matches) > len(LISTED) and all(row["image_id"] != row["query_id"] for row in matches)
    asks_with(world, few)
    _, of_source = world.run(lone)
    assert {row["image_id"] for row in of_source} - {row["image_id"] for row in of_few} == {world.pool_ids[0]}


def test_listed_images_that_dedup_kept_are_selected_themselves_where_they_are_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = planted(tmp_path, monkeypatch)
    listed = listed_of(world, [0, 1, KEPT], "f" * 32)
    asking, _ = world.run(Sample(mode="sample", k=400), listed=listed, include=True)
    assert asking.details["short"] == 2, "what is kept is no hit of itself"
    assert asking.details["warnings"][0].startswith("1 of the 4 image_ids of birds.txt are not in the pool")
    alone, matches = world.run(AsIs(), listed=listed, include=True)
    assert not matches and alone.rows == Rows(0, 0)
    own = {world.pool_ids[0], world.pool_ids[1]}
    for done, count in ((asking, KEPT), (alone, 2)):
        spec = SelectSpec(everything=False, sets=["flowers"], shared="each")
        stage = Stage("retrieve", "all", 2, "ray", retrieve.run_all, spec)
        inputs = {"retrieve:flowers": done, "dedup": world.inputs["dedup"]}
        together = retrieve.run_all(Context(world.store, stage, f"all-{count}", inputs, 1, ignore))
        rows = world.store.table(together.tables["selected"]).to_pylist()
        assert {row["image_id"] for row in rows if row["mode"] == "by_hand"} == own
        assert len({row["image_id"] for row in rows}) == len(rows) == count
        assert together.details.as_is_by_set == {"flowers": 2}


# -- what cannot work


def test_a_list_without_images_of_the_pool_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = planted(tmp_path, monkeypatch)
    with pytest.raises(LodesetError, match=r"`flowers`: none of the 1 image_ids of birds\.txt"):
        world.run(AsIs(), listed=listed_of(world, [], "f" * 32), include=True)


@pytest.mark.parametrize("mode", [AsIs(), Sample(mode="sample"), Cluster(mode="cluster")])
def test_an_empty_set_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    world = planted(tmp_path, monkeypatch)
    world.inputs["queries"] = by_hand(world.store, "none", {"vectors": []})
    with pytest.raises(LodesetError, match="`flowers` has no readable image"):
        world.run(mode)


@pytest.mark.parametrize("mode", [Sample(mode="sample"), Cluster(mode="cluster")])
def test_nothing_left_of_the_pool_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    world = planted(tmp_path, monkeypatch)
    gone = table(records.DUPLICATES, [(i, i, False, "reference", i, 1.0) for i in world.pool_ids])
    outcome = Outcome(
        {"duplicates": (world.store.commit_part("dedup", "gone", {"duplicates": gone}).files["duplicates"],)},
        Rows(POOL, 0, {"reference": POOL}),
    )
    world.inputs["dedup"] = artifact("dedup", "x", outcome)
    with pytest.raises(LodesetError, match=f"'reference': {POOL}.*`flowers` has nothing to retrieve from"):
        world.run(mode)


# -- all sets together


def test_what_becomes_of_an_image_that_several_sets_want(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "all"))
    one, other, third, brought = (name_of(n) for n in range(4))
    birds = [(one, "birds", "sample", "q1", 0.5, None), (one, "birds", "sample", "q2", 0.9, None)]
    birds += [(other, "birds", "sample", "q1", 0.75, None), (brought, "birds", "sample", "q1", 0.99, None)]
    cats = [(one, "cats", "cluster", "q3", 0.75, 7), (other, "cats", "cluster", "q3", 0.75, 7)]
    cats += [(third, "cats", "cluster", "q3", 0.25, 7)]
    told = {"asked": 4, "retrieved": 4, "distinct": 3, "collisions": 1, "short": 0, "capped": 0}
    kept = [(i, i, True, "included" if i == brought else "unique", None, None) for i in (one, other, third, brought)]
    owned = pa.table({"image_id": [brought, name_of(99)]})  # dedup did not keep the other one
    inputs = {
        "retrieve:birds": by_hand(store, "b", {"matches": [table(records.MATCHES, birds)]}, told),
        "retrieve:cats": by_hand(store, "c", {"matches": [table(records.MATCHES, cats)]}, {**told, "collisions": 0}),
        "images:dogs": by_hand(store, "d", {"images": [owned]}),
        "dedup": by_hand(store, "dedup", {"duplicates": [table(records.DUPLICATES, kept)]}),
    }

    def run(shared: Literal["each", "best"]) -> tuple[Outcome, list[tuple[str, str, str | None]]]:
        spec = SelectSpec(everything=False, sets=["birds", "cats", "dogs"], shared=shared)
        stage = Stage("retrieve", "all", 2, "ray", retrieve.run_all, spec)
        done = retrieve.run_all(Context(store, stage, f"all-{shared}", inputs, 1, ignore))
        rows = store.table(done.tables["selected"]).to_pylist()
        return done, [(row["image_id"], row["set"], row["query_id"]) for row in rows]

    each, rows = run("each")
    wanted = {(one, "birds", "q2"), (one, "cats", "q3"), (other, "birds", "q1"), (other, "cats", "q3")}
    wanted |= {(third, "cats", "q3"), (brought, "birds", "q1"), (brought, "dogs", None)}
    assert set(rows) == wanted and rows == sorted(rows, key=lambda row: row[:2])
    best, rows = run("best")
    # The most similar; equally similar, so the smaller name; alone; included by its set, which comes before similarity.
    assert set(rows) == {(one, "birds", "q2"), (other, "birds", "q1"), (third, "cats", "q3"), (brought, "dogs", None)}
    for done in (each, best):
        assert done.rows == Rows(7, 4, {"several_sets": 3})
        told = done.details
        assert told.shared == 3 and told.shared_by_set == {"birds": 3, "cats": 2, "dogs": 1}
        assert told.as_is_by_set == {"birds": 0, "cats": 0, "dogs": 1}
        assert (told.asked, told.collisions) == (8, 1)
