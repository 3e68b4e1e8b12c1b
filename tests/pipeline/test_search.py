"""The vectors and the index that searches share, laid out once in the store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest

from lodeset.pipeline.algorithms.neighbors.approximate import ApproximateIndex, Asked
from lodeset.pipeline.algorithms.neighbors.exact import ExactIndex
from lodeset.pipeline.config import Sample
from lodeset.pipeline.dag.stage import Context, Stage
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import DedupRuntime, RetrieveSpec
from lodeset.pipeline.stages import retrieve, search
from lodeset.pipeline.stages.dedup import run as dedup
from lodeset.pipeline.stages.dedup.generations import TABLE, generations_of
from lodeset.pipeline.stages.dedup.universe import Members
from lodeset.pipeline.tables.vectors import vector_table


def context_in(folder: Path) -> Context:
    stage = Stage("dedup", "pool", 1, "ray", lambda _: pytest.fail("not run"), {})
    return Context(Store(str(folder)), stage, "of-dedup", {}, 2, lambda _: None)


def written(store: Store, name: str, ids: list[str], vectors: np.ndarray) -> File:
    return store.write_named(f"{name}.parquet", vector_table(ids, vectors))


def world(store: Store, count: int) -> tuple[dict[str, list[File]], list[str], np.ndarray]:
    """Two sets of several files in any order; ids in order, and their vectors."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, 12)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    ids = [f"{n:032x}" for n in range(count)]
    order = rng.permutation(count)
    cuts = [order[: count // 3], order[count // 3 : count // 2], order[count // 2 :]]
    files = [written(store, f"file{n}", [ids[i] for i in rows], vectors[rows]) for n, rows in enumerate(cuts)]
    return {"pool": files[:2], "test": files[2:]}, ids, vectors


@pytest.mark.parametrize("asked, kind", [("auto", ExactIndex), ("ivfpq", ApproximateIndex), ("hnsw", ApproximateIndex)])
def test_vectors_are_laid_out_once_and_found_by_every_worker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], asked: Asked, kind: type
) -> None:
    context = context_in(tmp_path)
    files, ids, vectors = world(context.store, 2_500)
    plan = search.chosen(context, files, 2_500, 2_500, 5, asked)
    assert plan.dimensions == 12
    base = search.prepared(context, plan, files, ids, "basis")
    assert capfd.readouterr().err.startswith(f"neighbors of 2,500 x 12: {plan.kind}, about ")
    assert search.prepared(context, plan, files, ids, "basis") == base
    assert len(context.store.names(f"parts/{search.STAGE}")) == 1  # the scratch folder is gone, too
    index = search.opened(context.store, base)
    assert isinstance(index, kind)
    np.testing.assert_array_equal(index.vectors, vectors)
    _, rows = index.search(index.vectors[:100], 5)
    assert (rows[:, 0] == np.arange(100)).mean() > 0.98


def test_another_kind_of_index_is_another_part(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    files, ids, _ = world(context.store, 2_500)
    kinds = {
        search.prepared(context, search.chosen(context, files, 2_500, 2_500, 5, asked), files, ids, "basis").index
        for asked in ("exact", "ivfpq")
    }
    assert len(kinds) == 2 and len(context.store.names(f"parts/{search.STAGE}")) == 2


def test_sets_of_different_widths_are_named(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    files, _, _ = world(context.store, 30)
    files["test"] = [written(context.store, "wide", ["0" * 32], np.ones((1, 7), np.float16))]
    with pytest.raises(LodesetError, match="vectors of `test` have 7 dimensions, those of `pool` 12"):
        search.chosen(context, files, 30, 30, 5, "auto")


@pytest.mark.parametrize("asked", ["exact", "ivfpq"])
def test_dedup_and_retrieval_search_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Asked) -> None:
    """In parts of several sizes, by workers that are pickled as Ray's are; a second search makes no part."""

    def map_with_state(make: Any, items: Any, **_: Any) -> Any:
        return map(cloudpickle.loads(cloudpickle.dumps(make))(), items)

    monkeypatch.setattr(dedup, "map_with_state", map_with_state)
    monkeypatch.setattr(retrieve, "map_with_state", map_with_state)
    context = context_in(tmp_path)
    files, ids, vectors = world(context.store, 2_500)
    table = pa.table({"image_id": ids, "group_id": ids, "kept": [True] * 2_500, "reason": ["unique"] * 2_500})
    inputs = {
        role: Artifact(role, "pool", 1, role, {}, {}, {"vectors": tuple(found)}, Rows(0, 0))
        for role, found in {
            "vectors:pool": files["pool"],
            "vectors:test": files["test"],
            "vectors": [*files["pool"], *files["test"]],
            "queries": files["test"],
        }.items()
    }
    kept = {"duplicates": (context.store.write_named("duplicates.parquet", table),)}
    inputs["dedup"] = Artifact("dedup", "pool", 1, "dedup", {}, {}, kept, Rows(0, 0))
    stage = dataclasses.replace(
        context.stage,
        set="flowers",
        spec=RetrieveSpec(mode=Sample(mode="sample", k=4), neighbors=asked),
        runtime=DedupRuntime(part_images=1_000, max_pixels=10**6),
    )
    context = dataclasses.replace(context, stage=stage, inputs=inputs)

    sets = [Members(name, "pool", (), tuple(found)) for name, found in files.items()]
    generations = generations_of(context.store, None, ids)
    (a, b, similarity), parts, made = dedup._search(context, sets, generations, 4, asked, -1.0)
    assert (parts, made) == (3, 3) and dedup._search(context, sets, generations, 4, asked, -1.0)[2] == 0
    expected = {
        (min(i, j), max(i, j))
        for i, row in enumerate(ExactIndex(vectors).search(vectors, 5)[1].tolist())
        for j in row
        if i != j
    }
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    # Random directions, without clusters, are the hardest world for cells and codes.
    assert len(expected & pairs) >= (1.0 if asked == "exact" else 0.85) * len(expected)
    true = np.einsum("nd,nd->n", vectors[a].astype(np.float64), vectors[b].astype(np.float64))
    np.testing.assert_allclose(similarity, true, atol=1e-6)

    # The newest 300 images apart: the others among themselves and among them, each in three parts; they among both, in one.
    (first,) = generations_of(context.store, None, ids[:2_200])
    tables = {TABLE: (first.file,)}
    earlier = Artifact("dedup", "pool", 1, "earlier", {}, {}, tables, Rows(0, 0))
    grown = dedup._search(context, sets, generations_of(context.store, earlier, ids), 4, asked, -1.0)
    assert grown[1:] == (8, 8)
    if asked == "exact":
        for one, other in zip(grown[0], (a, b, similarity), strict=True):
            np.testing.assert_array_equal(one, other)
    above = dedup._search(context, sets, generations, 4, asked, 0.5)[0]
    near = similarity > 0.5
    assert [x.tolist() for x in above] == [x[near].tolist() for x in (a, b, similarity)]

    queries = sorted(context.store.table(files["test"], ["image_id"])["image_id"].to_pylist())
    asked_with = retrieve.Queries(tuple(files["test"]), "test")
    hits = retrieve._search(context, asked_with, Sample(mode="sample", k=3, part_images=500))
    matches = context.store.table(hits)
    assert matches.num_rows == 3 * len(queries)
    own = sum(q == i for q, i in zip(matches["query_id"].to_pylist(), matches["image_id"].to_pylist(), strict=True))
    assert own >= 0.98 * len(queries)
