"""Hierarchical k-means with resampling, and balanced sampling from its clusters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lodeset.pipeline.algorithms.clusters import hierarchy, kmeans
from lodeset.pipeline.algorithms.clusters.balance import balanced, shared
from lodeset.pipeline.algorithms.clusters.points import hashed
from lodeset.pipeline.errors import LodesetError

sizes_ = st.lists(st.integers(0, 50), min_size=1, max_size=30).map(lambda s: np.array(s, np.int64))


def tree(images: int, lowest: int, above: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random paths [images, levels] with small and large clusters, and keys."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.1, images) - 1, lowest - 1).astype(np.int32)
    parents, below = [], lowest
    for k in above:
        parents.append(rng.integers(0, k, below).astype(np.int32))
        below = k
    return hierarchy.paths(labels, parents), hashed(np.arange(images, dtype=np.uint64), seed, 9)


def test_levels_must_fall_and_fit() -> None:
    hierarchy.checked([1000, 300, 3], 1000)
    with pytest.raises(LodesetError, match="lowest first"):
        hierarchy.checked([300, 1000], 5000)
    with pytest.raises(LodesetError, match="lowest first"):
        hierarchy.checked([300, 300], 5000)
    with pytest.raises(LodesetError, match=r"cluster.k = 1000 is more than the 999 images"):
        hierarchy.checked([1000, 300], 999)


def test_members_nearest_to_their_centroid() -> None:
    labels = np.array([0, 1, 0, 0, 1, 2], np.int32)
    squared = np.array([0.3, 0.1, 0.2, 0.3, 0.1, 9.0], np.float32)
    assert hierarchy.nearest_members(labels, squared, 2).tolist() == [0, 1, 2, 4, 5]
    assert hierarchy.nearest_members(labels, squared, 1).tolist() == [1, 2, 5]


def test_sampled_from_a_cluster_is_half_of_the_mean() -> None:
    assert [hierarchy.resampled_each(n, k) for n, k in ((29_700, 1000), (1000, 300), (500_000, 50_000))] == [15, 2, 5]


def test_resampling_spreads_centroids_over_the_support() -> None:
    """Two squares of the same area, one with 40 times as many points: k-means alone leaves the sparse one short."""
    rng = np.random.default_rng(0)
    points = rng.random((8_200, 2)).astype(np.float32)
    points[8_000:, 0] += 3
    share = {}
    for steps in (0, 10):
        lowest = hierarchy.resampled(points, 160, 15, 0, seed=0)
        (top,) = hierarchy.levels(lowest, [40], 15, steps, seed=0)
        share[steps] = float((top[:, 0] > 2).mean())
    assert share[0] < 0.4 and share[10] > share[0] + 0.05
    assert share[10] == pytest.approx(0.5, abs=0.1)


def test_paths_lead_from_the_top_to_the_lowest_cluster() -> None:
    rng = np.random.default_rng(1)
    levels = [rng.normal(size=(k, 3)).astype(np.float32) for k in (20, 6, 2)]
    points = rng.normal(size=(100, 3)).astype(np.float32)
    labels, _ = kmeans.assign(points, levels[0])
    paths = hierarchy.paths(labels, hierarchy.parents(levels))
    assert paths.shape == (100, 3) and (paths[:, 2] == labels).all()
    for lower, upper in ((2, 1), (1, 0)):
        below, above = levels[2 - lower][paths[:, lower]], levels[2 - upper]
        assert (((below[:, None] - above[None]) ** 2).sum(-1).argmin(1) == paths[:, upper]).all()


@given(sizes=sizes_, request=st.integers(0, 1_600), seed=st.integers(0, 9))
def test_shares_are_even_and_sum_to_the_request(sizes: np.ndarray, request: int, seed: int) -> None:
    given_ = shared(sizes, request, hashed(np.arange(len(sizes), dtype=np.uint64), seed, 0))
    assert given_.sum() == min(request, sizes.sum())
    assert (given_ >= 0).all() and (given_ <= sizes).all()
    short = given_ < sizes  # whoever gives less than it has gives as much as anyone, up to the remainder
    if short.any():
        assert given_.max() <= given_[short].min() + 1


@settings(deadline=None)
@given(request=st.integers(0, 700), seed=st.integers(0, 20), above=st.sampled_from([[], [5], [12, 3]]))
def test_a_sample_has_no_row_twice_and_the_size_that_was_asked_for(request: int, seed: int, above: list[int]) -> None:
    paths, keys = tree(600, 40, above, seed)
    rows = balanced(paths, keys, request, seed)
    assert len(rows) == min(request, 600) and len(set(rows.tolist())) == len(rows)
    top, available = np.bincount(paths[rows, 0], minlength=40), np.bincount(paths[:, 0], minlength=40)
    short = top < available
    if short.any():
        assert top.max() <= top[short].min() + 1


def test_a_sample_does_not_depend_on_the_order_of_rows() -> None:
    paths, keys = tree(600, 40, [12, 3], 3)
    expected = sorted(keys[balanced(paths, keys, 150, 5)].tolist())
    order = np.random.default_rng(0).permutation(600)
    assert sorted(keys[order][balanced(paths[order], keys[order], 150, 5)].tolist()) == expected
    assert sorted(keys[balanced(paths, keys, 150, 6)].tolist()) != expected


def test_planted_clusters_are_equalised() -> None:
    """Four groups of 4,000, 1,000, 400 and 150: a random sample has 432, 108, 43 and 16 of 600."""
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(4), [4_000, 1_000, 400, 150])
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]])
    points = (centres[group] + rng.random((len(group), 2))).astype(np.float32)
    lowest = hierarchy.resampled(points, 60, 15, 0, seed=1)
    levels = [lowest, *hierarchy.levels(lowest, [4], 15, 5, seed=1)]
    labels, _ = kmeans.assign(points, lowest)
    paths = hierarchy.paths(labels, hierarchy.parents(levels))
    rows = balanced(paths, np.arange(len(points), dtype=np.uint64), 600, 0)
    assert np.bincount(group[rows]).tolist() == [150, 150, 150, 150]
