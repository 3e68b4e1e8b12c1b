"""Nearest neighbours against NumPy's argsort, and the properties that an exact search has."""

from __future__ import annotations

import io
from typing import Any

import faiss
import numpy as np
import psutil
import pytest

from lodeset.pipeline.algorithms.neighbors import approximate
from lodeset.pipeline.algorithms.neighbors import exact as neighbors
from lodeset.pipeline.algorithms.neighbors.exact import ExactIndex
from lodeset.pipeline.errors import LodesetError

ARITHMETIC = ("bf16", "fp32")


def clustered(rows: int, width: int, clusters: int, spread: float, seed: int = 0) -> np.ndarray:
    """Unit vectors [rows, width] in fp16 around random centres."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(clusters, width))[rng.integers(0, clusters, rows)] + spread * rng.normal(size=(rows, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def worlds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    one = clustered(1, 24, 1, 1.0)
    return {
        "random": clustered(900, 24, 900, 1.0),
        "clustered": clustered(900, 24, 6, 0.05),  # within bf16's rounding of each other
        "duplicated": clustered(90, 24, 90, 1.0)[rng.integers(0, 90, 900)],
        "all equal": np.repeat(one, 900, axis=0),
        "opposite": np.concatenate([np.repeat(one, 3, axis=0), -abs(clustered(897, 24, 50, 0.3))]),
        "zeros": np.concatenate([np.zeros((300, 24), np.float16), clustered(600, 24, 20, 0.2)]),
        "long": clustered(900, 24, 40, 0.3) * rng.uniform(0.1, 50, (900, 1)).astype(np.float16),
    }


def by_argsort(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Products [Q, k] and rows, ties by row number. Rows of fp16 have products that fp64 holds without rounding."""
    products = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.lexsort((np.broadcast_to(np.arange(len(vectors)), products.shape), -products), axis=1)[:, :k]
    return np.take_along_axis(products, rows, 1), rows


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("world", list(worlds()))
def test_neighbours_are_those_of_argsort(world: str, arithmetic: neighbors.Arithmetic) -> None:
    vectors = worlds()[world]
    expected, rows_expected = by_argsort(vectors[:200], vectors, 12)
    products, rows = ExactIndex(vectors, threads=2, products=arithmetic).search(vectors[:200], 12)
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(products, expected, atol=2e-6 * scale)
    # Rows may change places only where fp32 cannot tell them apart.
    true = np.take_along_axis(vectors[:200].astype(np.float64) @ vectors.astype(np.float64).T, rows, 1)
    np.testing.assert_allclose(true, expected, atol=2e-6 * scale)
    assert all(len(set(found)) == 12 for found in rows.tolist())
    if world in ("duplicated", "all equal"):
        np.testing.assert_array_equal(rows, rows_expected)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("block, chunk_rows, threads", [(64, 100, 1), (512, 333, 3), (7, 5_000, 2)])
def test_neither_block_sizes_nor_threads_matter(
    monkeypatch: pytest.MonkeyPatch, arithmetic: neighbors.Arithmetic, block: int, chunk_rows: int, threads: int
) -> None:
    vectors = worlds()["clustered"]
    products, rows = ExactIndex(vectors, products="fp32").search(vectors, 20)
    monkeypatch.setattr(neighbors, "BLOCK", block)
    monkeypatch.setattr(neighbors, "QUERIES", block * 3)
    monkeypatch.setattr(neighbors, "CHUNK_BYTES", chunk_rows * 4 * 24)
    monkeypatch.setattr(neighbors, "RANKED_BYTES", chunk_rows * 2 * 24)
    others, other_rows = ExactIndex(vectors, threads, arithmetic).search(vectors, 20)
    np.testing.assert_array_equal(rows, other_rows)
    np.testing.assert_array_equal(products, others)


def test_more_near_ties_than_candidates_are_searched_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.concatenate([worlds()["all equal"], worlds()["clustered"]])
    expected = by_argsort(vectors[850:950], vectors, 5)
    monkeypatch.setattr(neighbors, "WIDE", 50)
    asked_again: list[int] = []
    again = ExactIndex._search_again
    monkeypatch.setattr(
        ExactIndex, "_search_again", lambda self, pool, q, k: asked_again.append(len(q)) or again(self, pool, q, k)
    )
    products, rows = ExactIndex(vectors, products="bf16").search(vectors[850:950], 5)
    assert sum(asked_again) >= 50
    np.testing.assert_allclose(products, expected[0], atol=2e-6)
    np.testing.assert_array_equal(rows[:50], expected[1][:50])


def test_a_permutation_of_the_rows_permutes_the_answer() -> None:
    vectors = worlds()["random"]
    order = np.random.default_rng(3).permutation(len(vectors))
    products, rows = ExactIndex(vectors, products="bf16").search(vectors[:100], 9)
    others, other_rows = ExactIndex(vectors[order], products="bf16").search(vectors[:100], 9)
    np.testing.assert_array_equal(products, others)
    np.testing.assert_array_equal(rows, order[other_rows])


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_fewer_rows_than_asked_for(arithmetic: neighbors.Arithmetic) -> None:
    vectors = clustered(5, 8, 5, 1.0)
    products, rows = ExactIndex(vectors, products=arithmetic).search(vectors[:2], 8)
    np.testing.assert_array_equal(rows[:, :5], by_argsort(vectors[:2], vectors, 5)[1])
    assert (rows[:, 5:] == -1).all() and (products[:, 5:] == -np.inf).all()
    nothing, none = ExactIndex(vectors[:0], products=arithmetic).search(vectors[:2], 3)
    assert (none == -1).all() and (nothing == -np.inf).all()
    assert ExactIndex(vectors).search(vectors[:0], 3)[1].shape == (0, 3)


def test_a_memory_map_is_searched_like_an_array(tmp_path: Any) -> None:
    vectors = worlds()["random"]
    np.save(tmp_path / "vectors.npy", vectors)
    expected = ExactIndex(vectors).search(vectors[:50], 4)
    for mode in ("r", "c"):
        found = ExactIndex(np.load(tmp_path / "vectors.npy", mmap_mode=mode)).search(vectors[:50], 4)
        np.testing.assert_array_equal(found[1], expected[1])


def test_vectors_that_cannot_be_compared_are_named() -> None:
    vectors = worlds()["random"].copy()
    with pytest.raises(LodesetError, match="queries of 8 dimensions cannot be compared with vectors of 24"):
        ExactIndex(vectors).search(np.ones((1, 8), np.float16), 3)
    with pytest.raises(LodesetError, match=r"1 of 2 queries hold a NaN or an infinity \(the first is row 1\)"):
        ExactIndex(vectors).search(np.stack([vectors[0], np.full(24, np.nan, np.float16)]), 3)
    vectors[[4, 9]] = np.inf
    with pytest.raises(LodesetError, match=r"2 of 900 vectors hold a NaN or an infinity \(the first is row 4\)"):
        ExactIndex(vectors)


def test_a_gpu_proposes_candidates_where_faiss_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's function is FAISS's brute force on the CPU here: what is tested is how its answer is used."""
    asked: list[int] = []

    def knn_gpu(_: object, queries: np.ndarray, base: np.ndarray, k: int, metric: int) -> tuple[Any, Any]:
        asked.append(len(base))
        return faiss.knn(queries, base, k, metric=metric)

    monkeypatch.setattr(neighbors, "gpus", lambda: 1)
    monkeypatch.setattr(neighbors.faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(neighbors.faiss, "knn_gpu", knn_gpu)
    monkeypatch.setattr(neighbors, "CHUNK_BYTES", 400 * 4 * 24)
    for world in ("random", "duplicated"):
        vectors = worlds()[world]
        _, rows = ExactIndex(vectors).search(vectors[:600], 6)
        np.testing.assert_array_equal(rows, by_argsort(vectors[:600], vectors, 6)[1])
    assert asked[:3] == [400, 400, 100]


# -- approximate


@pytest.mark.parametrize("kind", ["ivfpq", "hnsw"])
@pytest.mark.parametrize("width", [32, 30])
def test_approximate_neighbours_are_nearly_the_exact_ones(kind: approximate.Kind, width: int) -> None:
    vectors = clustered(6_000, width, 300, 0.5)
    _, rows = ExactIndex(vectors).search(vectors[:500], 10)
    stored = io.BytesIO()
    approximate.write(approximate.build(vectors, kind, threads=2), stored.write)
    stored.seek(0)
    index = approximate.ApproximateIndex(approximate.read(stored.read), vectors, threads=2)
    products, found = index.search(vectors[:500], 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, found, strict=True)])
    assert recall > 0.93
    # What it does find has its true product, in order.
    true = np.einsum("qd,qkd->qk", vectors[:500].astype(np.float64), vectors[found].astype(np.float64))
    np.testing.assert_allclose(products, true, atol=1e-5)
    assert (np.diff(products, axis=1) <= 0).all() and (found[:, 0] == np.arange(500)).mean() > 0.99


@pytest.mark.parametrize("kind", ["ivfpq", "hnsw"])
def test_an_index_is_a_function_of_the_vectors_and_the_seed(kind: approximate.Kind) -> None:
    vectors = clustered(3_000, 16, 50, 0.5)
    made = []
    for threads in (1, 2):
        stored = io.BytesIO()
        approximate.write(approximate.build(vectors, kind, threads), stored.write)
        made.append(stored.getvalue())
    assert made[0] == made[1]


def test_the_choice_follows_the_work_and_says_what_it_takes() -> None:
    def kind(vectors: int, asked: approximate.Asked = "auto", queries: int | None = None) -> str:
        return approximate.plan(queries or vectors, vectors, 1_280, 64, asked, 2).kind

    assert kind(100_000) == "exact" and kind(1_000_000) == "ivfpq" and kind(1_000_000, queries=1_000) == "exact"
    assert kind(1_000_000, "exact") == "exact" and kind(50_000, "hnsw") == "hnsw" and kind(500, "ivfpq") == "exact"
    few, many = (approximate.plan(n, n, 1_280, 64, "auto", 2) for n in (15_747, 60_000))
    assert str(few).startswith("neighbors of 15,747 x 1,280: exact, about ") and str(few).endswith(" GiB")
    assert few.seconds < many.seconds and few.memory_gib < many.memory_gib


def test_a_graph_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    with pytest.raises(
        LodesetError, match=r"HNSW graph of 6,000 vectors of 32 dimensions needs about 0.0 GiB and 0.0 GiB"
    ):
        approximate.build(clustered(6_000, 32, 10, 0.5), "hnsw")
