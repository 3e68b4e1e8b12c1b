"""k-means against a plain slow one, and what must not change a result: workers, threads, row order, precision."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from lodeset.pipeline.algorithms.clusters import kmeans, points
from lodeset.pipeline.algorithms.clusters.points import Points, hashed, keys_of
from lodeset.pipeline.errors import LodesetError


def cloud(n: int, d: int, seed: int, centres: int = 12) -> np.ndarray:
    """fp16 rows of length 1 around some centres."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(centres, d))[rng.integers(0, centres, n)] + rng.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def squares(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return ((vectors[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(-1)


def lloyd(vectors: np.ndarray, centroids: np.ndarray, steps: int) -> tuple[np.ndarray, list[float]]:
    """The plain algorithm; empty clusters stay where they are."""
    distances = []
    for _ in range(steps):
        labels = squares(vectors, centroids).argmin(1)
        centroids = np.stack([
            vectors[labels == c].astype(np.float64).mean(0) if (labels == c).any() else centroids[c]
            for c in range(len(centroids))
        ]).astype(np.float32)  # fmt: skip
        distances.append(float(((vectors.astype(np.float64) - centroids[labels]) ** 2).sum(1).mean()))
    return centroids, distances


@pytest.mark.parametrize("d", [2, 32, 96])
def test_lloyd_steps_are_those_of_the_plain_algorithm(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_moved", lambda each, centroids, *_: (centroids, 0))
    monkeypatch.setattr(kmeans, "TOLERANCE", 0.0)
    monkeypatch.setattr(kmeans, "LOW_PRODUCTS", 0)  # bf16 where the CPU has it
    vectors = cloud(700, d, 0)
    start = vectors[:9].astype(np.float32)
    expected, distances = lloyd(vectors, start, 6)
    fit = kmeans.fit(vectors, 9, 6, seed=0, start=start)
    np.testing.assert_allclose(fit.centroids, expected, atol=1e-6)
    np.testing.assert_allclose(fit.distances, distances[: len(fit.distances)], rtol=1e-5)
    assert distances[-1] == pytest.approx(fit.distances[-1], rel=1e-5)  # it ends early only where no point moves
    assert fit.counts.sum() == 700


@pytest.mark.parametrize("low", [True, False])
def test_labels_are_those_of_float64(low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if low and not kmeans.has_bf16():
        pytest.skip("this CPU has no bf16 products")
    monkeypatch.setattr(kmeans, "_low", lambda *_: low)
    vectors, centroids = cloud(3_000, 128, 1, centres=300), cloud(400, 128, 2, centres=300).astype(np.float32)
    # Centroids a hair apart, which neither bf16 nor fp32 can tell from each other.
    centroids[200:400] = centroids[:200] * (1 + 1e-7)
    expected = squares(vectors[:, None][:, 0], centroids)
    labels, squared = kmeans.assign(vectors, centroids)
    assert (labels == expected.argmin(1)).all()
    np.testing.assert_allclose(squared, expected.min(1), atol=1e-5)


def test_a_row_s_products_do_not_depend_on_the_rows_beside_it() -> None:
    """What makes a fit independent of how points are spread over workers and threads."""
    rows = torch.from_numpy(cloud(300, 96, 3).astype(np.float32))
    for kind in (torch.bfloat16, torch.float32):
        whole = points.products(rows.to(kind), rows[:70].to(kind))
        for some in (slice(0, 1), slice(5, 8), slice(100, 117), slice(33, 300)):
            assert torch.equal(points.products(rows[some].to(kind), rows[:70].to(kind)), whole[some]), (kind, some)


@pytest.mark.parametrize("low_products", [0, 2**62])
def test_a_fit_depends_neither_on_workers_nor_on_the_order_of_rows_nor_on_threads(
    low_products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "LOW_PRODUCTS", low_products)
    vectors = cloud(1_500, 80, 4, centres=60)
    keys = hashed(np.arange(1_500, dtype=np.uint64), 5, 0)
    one = kmeans.fit(vectors, 40, 12, seed=3, keys=keys)
    order = np.random.default_rng(0).permutation(1_500)
    for cuts, threads in (([], 2), ([1], 1), ([400, 401, 401, 1_200], 1)):
        workers = [Points(vectors[rows], keys[rows], threads) for rows in np.split(order, cuts)]
        several = kmeans.fit_each(kmeans.here(workers), 40, 12, seed=3)
        assert (several.centroids == one.centroids).all(), cuts
        assert several.distances == one.distances
    assert (kmeans.fit(vectors, 40, 12, seed=4, keys=keys).centroids != one.centroids).any()


def test_distance_never_rises_and_moving_clusters_lowers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = cloud(3_000, 32, 6, centres=50)
    start = vectors[:50].astype(np.float32)  # several in one group, none in others: an optimum that steps do not leave
    fit = kmeans.fit(vectors, 50, 30, seed=0, start=start)
    assert all(later <= earlier for earlier, later in zip(fit.distances, fit.distances[1:], strict=False))
    monkeypatch.setattr(kmeans, "_moved", lambda each, centroids, *_: (centroids, 0))
    stuck = kmeans.fit(vectors, 50, 30, seed=0, start=start)
    assert fit.distances[-1] < 0.98 * stuck.distances[-1]


def test_a_move_that_is_a_loss_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = cloud(800, 16, 7)
    start = vectors[:12].astype(np.float32)
    monkeypatch.setattr(kmeans, "_moved", lambda each, centroids, *_: (centroids, 0))
    plain = kmeans.fit(vectors, 12, 10, seed=0, start=start)
    monkeypatch.setattr(kmeans, "_moved", lambda each, centroids, *_: (centroids * 0 + centroids[:1], 12))
    spoiled = kmeans.fit(vectors, 12, 11, seed=0, start=start)
    assert all(later <= earlier for earlier, later in zip(spoiled.distances, spoiled.distances[1:], strict=False))
    assert spoiled.distances[-1] == pytest.approx(plain.distances[-1], rel=0.02)


def test_seeds_are_near_those_of_k_means_plus_plus_and_all_groups_get_one() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 24)) * 3
    sizes = [1_000 if c < 10 else 20 for c in range(30)]  # uniform draws would miss most of the small ones
    group = np.repeat(np.arange(30), sizes)
    vectors = (centres[group] + rng.normal(size=(len(group), 24)) * 0.1).astype(np.float32)
    workers = [Points(vectors, np.arange(len(vectors), dtype=np.uint64))]
    each = kmeans.here(workers)
    total = each(Points.total)[0]
    each(functools.partial(Points.begin, mean=total.sums / total.count, unit=1.0, low=False))
    found = kmeans.seeds(each, 30, 0, len(vectors))
    nearest = squares(found, centres).argmin(1)
    assert len(set(nearest)) == 30


def test_many_candidates_are_chosen_from_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = cloud(2_000, 16, 8, centres=40)
    exact = kmeans.fit(vectors, 40, 20, seed=0).distances[-1]
    monkeypatch.setattr(kmeans, "SQUARE_CANDIDATES", 10)
    monkeypatch.setattr(kmeans, "BATCHES", 8)
    assert kmeans.fit(vectors, 40, 20, seed=0).distances[-1] < 1.05 * exact


def test_one_cluster_and_as_many_as_points() -> None:
    vectors = cloud(60, 16, 9)
    one = kmeans.fit(vectors, 1, 5, seed=0)
    np.testing.assert_allclose(one.centroids[0], vectors.astype(np.float64).mean(0), atol=1e-6)
    alone = kmeans.fit(vectors, 60, 5, seed=0)
    assert alone.distances[-1] == pytest.approx(0, abs=1e-6)
    assert sorted(kmeans.assign(vectors, alone.centroids)[0]) == list(range(60))


def test_empty_clusters_start_again_at_the_farthest_points() -> None:
    vectors = cloud(500, 16, 10)
    start = np.repeat(vectors[:1].astype(np.float32), 8, axis=0)  # all but one are empty after the first step
    start[1:] += np.arange(1, 8, dtype=np.float32)[:, None] * 10
    fit = kmeans.fit(vectors, 8, 20, seed=0, start=start)
    assert (fit.counts > 0).all()
    assert fit.distances[-1] < fit.distances[0]


def test_spherical_centroids_have_length_one() -> None:
    vectors = cloud(600, 24, 11)
    fit = kmeans.fit(vectors, 10, 15, seed=0, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(fit.centroids, axis=1), 1, rtol=1e-6)
    labels, _ = kmeans.assign(vectors, fit.centroids)
    assert (labels == (vectors.astype(np.float64) @ fit.centroids.T.astype(np.float64)).argmax(1)).all()


def test_going_on_from_centroids_keeps_what_is_converged() -> None:
    vectors = cloud(900, 16, 12)
    first = kmeans.fit(vectors, 12, 50, seed=0)
    again = kmeans.fit(vectors, 12, 50, seed=1, start=first.centroids)
    assert again.distances[-1] <= first.distances[-1] * (1 + 1e-6)
    with pytest.raises(LodesetError, match="12 x 16 are needed"):
        kmeans.fit(vectors, 12, 5, seed=0, start=first.centroids[:3])


def test_more_clusters_than_points_or_than_points_that_differ() -> None:
    vectors = cloud(50, 16, 13)
    with pytest.raises(LodesetError, match="k = 51 clusters of 50 vectors"):
        kmeans.fit(vectors, 51, 5, seed=0)
    copies = np.repeat(vectors[:7], 20, axis=0)
    with pytest.raises(LodesetError, match="only 7 of 140 vectors differ: choose k of at most 7"):
        kmeans.fit(copies, 8, 5, seed=0)
    fit = kmeans.fit(copies, 7, 5, seed=0)
    assert fit.counts.tolist() == [20] * 7
    assert fit.distances[-1] == pytest.approx(0, abs=1e-6)


def test_vectors_that_are_not_finite() -> None:
    vectors = cloud(50, 16, 14)
    vectors[3, 2], vectors[9, 0] = np.nan, np.inf
    with pytest.raises(LodesetError, match="2 of 50 vectors contain NaN"):
        kmeans.fit(vectors, 4, 5, seed=0)


def test_sums_of_half_precision_are_exact() -> None:
    vectors = cloud(4_000, 8, 15)
    rows = np.random.default_rng(1).permutation(4_000)
    sums = [Points(v, np.zeros(4_000, np.uint64)).total().sums for v in (vectors, vectors[rows], vectors[::-1])]
    assert (sums[0] == sums[1]).all() and (sums[0] == sums[2]).all()


def test_keys_and_hashes() -> None:
    assert keys_of(["00000000000000ff" + "0" * 16, "f" * 32]).tolist() == [255, 2**64 - 1]
    keys = np.arange(100_000, dtype=np.uint64)
    uniform = hashed(keys, 0, 1).astype(np.float64) / 2.0**64
    assert abs(uniform.mean() - 0.5) < 0.005 and abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.02
    assert len(np.unique(hashed(keys, 7, 3))) == 100_000
    assert (hashed(keys, 0, 1) != hashed(keys, 1, 0)).all()
