"""The stages that fit clusters, assign images to them and draw a balanced sample, on a pool of vectors made by hand."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import picture
from inline import artifact, ran, without_engine

from lodeset.pipeline.algorithms.clusters import kmeans
from lodeset.pipeline.algorithms.clusters.points import Points, keys_of
from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.dag.cluster import LOCAL
from lodeset.pipeline.dag.stage import Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.engines.ray import cluster as ray_cluster
from lodeset.pipeline.engines.ray import holding
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.graph import build
from lodeset.pipeline.stages import cluster, fit_clusters
from lodeset.pipeline.stages.fit_clusters import read_levels
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.vectors import vector_table

GROUPS = (300, 60, 30)  # images of each planted group
IDS = [hashlib.sha256(str(n).encode()).hexdigest()[:32] for n in range(sum(GROUPS) + 10)]
DROPPED = IDS[sum(GROUPS) :]  # by dedup


def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2, 0], [*GROUPS, len(DROPPED)])
    rows = np.eye(3, 16)[group] + rng.normal(size=(len(IDS), 16)) * 0.05
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def pool(store: Store, order: np.ndarray, cuts: list[int]) -> dict[str, Artifact]:
    """`embed/pool` in files cut as said, of rows in that order, and what dedup kept of them."""
    files = []
    for n, rows in enumerate(np.split(order, cuts)):
        table = vector_table([IDS[r] for r in rows], vectors()[rows])
        files.append(store.commit_part("embed", f"{n}-{len(cuts)}", {"vectors": table}).files["vectors"])
    duplicates = pa.Table.from_pylist(
        [
            {"image_id": i, "group_id": i, "kept": i not in DROPPED, "reason": "near" if i in DROPPED else "unique"}
            for i in IDS
        ],
        schema=records.DUPLICATES,
    )
    kept = store.commit_part("dedup", f"{len(cuts)}", {"duplicates": duplicates}).files["duplicates"]
    rows_ = Rows(len(IDS), len(IDS))
    return {
        "embed/pool": artifact("embed", "pool", Outcome({"vectors": tuple(files)}, rows_)),
        "dedup/pool": artifact("dedup", "pool", Outcome({"duplicates": (kept,)}, rows_)),
    }


def run(tmp_path: Path, patch: pytest.MonkeyPatch, cuts: list[int], cpus: int, **sections: Any) -> dict[str, Any]:
    """The artifacts of every stage from fit_clusters to `retrieve/all`, and the store."""
    for module in (fit_clusters, cluster):
        without_engine(module, patch)
    stages = build_stages(tmp_path, **sections)
    store = Store(str(tmp_path / f"store-{len(cuts)}-{cpus}"))
    done: dict[str, Any] = {"store": store, **pool(store, np.random.default_rng(len(cuts)).permutation(len(IDS)), cuts)}
    for id_ in ("fit_clusters/pool", "cluster/pool", "balance/pool", "retrieve/all"):
        if id_ in stages:
            done[id_] = ran(store, stages[id_], done, cpus)
    return done


def build_stages(tmp_path: Path, **sections: Any) -> dict[str, Stage]:
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images/a.png").write_bytes(picture(1))
    (tmp_path / "v.parquet").write_bytes(b"")
    base = {"dedup": {"threshold": 0.9, "reference_threshold": 0.9}}
    embed = {"semantic": {"kind": "precomputed", "path": str(tmp_path / "v.parquet")}}
    config = CurationConfig.model_validate({"pool": str(tmp_path / "images"), "embed": embed, **base, **sections})
    return build(config)


def table(done: dict[str, Any], id_: str, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = done["store"].table(done[id_].tables[name]).to_pylist()
    return found


def test_a_balanced_sample_is_selected_instead_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"cluster": {"k": [24, 3], "resampling": 4}, "balance": {"images": 75}}
    done = run(tmp_path, monkeypatch, [100, 250], 1, **sections)
    selected = table(done, "retrieve/all", "selected")
    assert {(r["set"], r["mode"], r["query_id"], r["similarity"]) for r in selected} == {
        ("pool", "balance", None, None)
    }
    group = dict(zip(IDS, np.repeat([0, 1, 2, 0], [*GROUPS, len(DROPPED)]), strict=True))
    assert Counter(int(group[r["image_id"]]) for r in selected) == {0: 25, 1: 25, 2: 25}
    assert not {r["image_id"] for r in selected} & set(DROPPED)
    drawn = done["balance/pool"]
    assert (drawn.rows.taken, drawn.rows.kept, drawn.rows.dropped) == (390, 75, {"not_drawn": 315})
    assert drawn.details["asked"] == 75

    levels = read_levels(done["store"], done["fit_clusters/pool"])
    assert [len(level) for level in levels] == [24, 3] == done["fit_clusters/pool"].details["levels"]
    path = {r["image_id"]: r["path"] for r in table(done, "cluster/pool", "clusters")}
    assert len(path) == 390
    assert all(r["path"][-1] == r["cluster"] for r in table(done, "cluster/pool", "clusters"))
    assert all(r["cluster"] == path[r["image_id"]][-1] for r in selected)


def test_clusters_depend_neither_on_files_nor_on_actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_clusters, "BYTES_PER_ACTOR", 1)
    sections = {"cluster": {"k": 20, "seed": 2}, "balance": {"images": 50, "seed": 1}}
    one = run(tmp_path, monkeypatch, [], 1, **sections)
    many = run(tmp_path, monkeypatch, [3, 4, 90, 200, 330], 3, **sections)
    assert len(fit_clusters.shares(many["embed/pool"].tables["vectors"], 3)) == 3
    (first,), (second,) = (read_levels(d["store"], d["fit_clusters/pool"]) for d in (one, many))
    assert (first == second).all()
    drawn = [[(r["image_id"], r["cluster"]) for r in table(d, "retrieve/all", "selected")] for d in (one, many)]
    assert drawn[0] == drawn[1]


def test_centroids_are_kept_until_they_fit_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tmp_path, monkeypatch, [100, 250], 1, cluster={"k": 20})
    store, first, pool_vectors = done["store"], done["fit_clusters/pool"], done["embed/pool"]
    stage = build_stages(tmp_path, cluster={"k": 20})["fit_clusters/pool"]
    assert stage.follows is not None and "drift" not in stage.follows.keys

    same = ran(store, stage, done, previous=first)
    assert same.content == first.content and same.tables == first.tables
    assert abs(same.details["drift"]) < 0.01 and same.details["parts_made"] == 0
    # All images at random, where they lay around three directions.
    rng = np.random.default_rng(0)
    away = rng.normal(size=(len(IDS), 16)).astype(np.float32)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    file = store.commit_part("embed", "away", {"vectors": vector_table(IDS, away.astype(np.float16))}).files["vectors"]
    moved = replace(pool_vectors, tables={"vectors": (file,)})
    refitted = ran(store, stage, {**done, "embed/pool": moved}, previous=first)
    assert refitted.details["refitted_at_drift"] > 0.1 and refitted.content != first.content


def test_assignments_are_made_anew_only_where_what_is_kept_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(tmp_path, monkeypatch, [100, 250], 1, cluster={"k": 20})
    store, stage = done["store"], build_stages(tmp_path, cluster={"k": 20})["cluster/pool"]
    assert ran(store, stage, done).details["parts_made"] == 0
    duplicates = store.table(done["dedup/pool"].tables["duplicates"])
    ids = duplicates["image_id"].to_pylist()
    kept = [k and i != IDS[0] for i, k in zip(ids, duplicates["kept"].to_pylist(), strict=True)]
    fewer = duplicates.set_column(duplicates.schema.get_field_index("kept"), "kept", pa.array(kept))
    file = store.commit_part("dedup", "fewer", {"duplicates": fewer}).files["duplicates"]
    dedup = replace(done["dedup/pool"], fingerprint="fewer", tables={"duplicates": (file,)})
    made = ran(store, stage, {**done, "dedup/pool": dedup})
    assert (made.details["parts"], made.details["parts_made"], made.rows.kept) == (3, 1, 389)


def test_without_balance_everything_is_selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tmp_path, monkeypatch, [100], 1)
    assert len(table(done, "retrieve/all", "selected")) == 390
    assert "balance/pool" not in done
    assert done["fit_clusters/pool"].details["k"] == kmeans.choose_k(390)


def test_a_request_larger_than_the_pool_takes_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tmp_path, monkeypatch, [100], 1, balance={"images": 1_000})
    assert len(table(done, "retrieve/all", "selected")) == 390
    assert (done["balance/pool"].details["asked"], done["balance/pool"].details["distinct"]) == (1_000, 390)


def test_more_clusters_than_images_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LodesetError, match=r"cluster\.k = 400 is more than the 390 images that dedup kept"):
        run(tmp_path, monkeypatch, [], 1, cluster={"k": [400, 3]})


def test_actors_are_as_many_as_pay_and_share_the_files() -> None:
    files = [File(f"{n}", 1, size * 2**20, "") for n, size in enumerate((100, 90, 50, 40, 30))]
    assert [sorted(f.path for f in g) for g in fit_clusters.shares(files, 2)] == [["0", "3", "4"], ["1", "2"]]
    assert len(fit_clusters.shares(files, 16)) == 4  # 310 MiB, 64 MiB each
    assert len(fit_clusters.shares(files[:1], 16)) == 1
    assert fit_clusters.shares([File("a", 1, 10, "")], 16) == [[File("a", 1, 10, "")]]


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with ray_cluster(LOCAL, 2) as joined:
        yield joined.address


def test_a_fit_over_ray_actors_is_that_of_one_process(ray_address: str) -> None:
    one = kmeans.fit(vectors(), 12, 10, seed=0, keys=keys_of(IDS))
    items = [np.arange(0, 250), np.arange(250, 400)]
    with holding(functools.partial(_held, vectors()), items, cpus_each=1, address=ray_address) as each:
        two = kmeans.fit_each(each, 12, 10, seed=0)
    assert (two.centroids == one.centroids).all() and two.distances == one.distances


def _held(matrix: np.ndarray, rows: np.ndarray) -> Points:
    if not len(rows):
        raise LodesetError("an actor without rows")
    return Points(matrix[rows], keys_of([IDS[r] for r in rows]))


def test_what_an_actor_raises_is_told(ray_address: str) -> None:
    items = [np.arange(3), np.arange(0)]
    with (
        pytest.raises(LodesetError, match="an actor without rows"),
        holding(functools.partial(_held, vectors()), items, cpus_each=1, address=ray_address) as each,
    ):
        each(Points.total)
