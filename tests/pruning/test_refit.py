"""Refit and the baselines' scores against plain NumPy."""

import numpy as np
import torch

from lodeset.pruning.choosing.at_random import random_scores
from lodeset.pruning.choosing.magnitude import magnitude_scores, top
from lodeset.pruning.choosing.refit import refit
from lodeset.pruning.units.groups import Group, Reader
from lodeset.pruning.units.moments import Gram, Moments


def moments(x: np.ndarray, y: np.ndarray) -> Moments:
    return Gram.from_activations(torch.from_numpy(x), torch.from_numpy(y)).moments("layer")


def test_refit_is_least_squares_with_an_intercept() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 2.0
    y = x @ rng.normal(size=(6, 3)) + rng.normal(size=(200, 3)) - 1.0
    keep = np.array([0, 2, 5])
    weight, bias = refit(moments(x, y), keep)
    expected, *_ = np.linalg.lstsq(np.column_stack([x[:, keep], np.ones(200)]), y, rcond=None)
    np.testing.assert_allclose(weight[:, keep], expected[:3].T, atol=1e-4)
    assert not weight[:, [1, 3, 4]].any()
    np.testing.assert_allclose(bias, expected[3], atol=1e-4)


def test_refit_on_constant_and_duplicate_units() -> None:
    rng = np.random.default_rng(0)
    column = rng.normal(size=100)
    x = np.column_stack([column, column, np.full(100, 3.0)])
    y = np.column_stack([2 * column + 1, -column])
    weight, bias = refit(moments(x, y), np.array([0, 1, 2]))
    np.testing.assert_allclose(x @ weight.T + bias, y, atol=1e-5)
    np.testing.assert_allclose(weight[:, 0], weight[:, 1], atol=1e-6)
    assert not weight[:, 2].any()
    only_constant, mean = refit(moments(x, y), np.array([2]))
    assert not only_constant.any()
    np.testing.assert_allclose(mean, y.mean(0))


def test_magnitude_scores_ignore_scale_moved_between_the_layers() -> None:
    torch.manual_seed(0)
    fc1, fc2 = torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)
    model, units = torch.nn.Sequential(fc1, fc2), np.arange(5)
    group = Group("0", 5, (Reader("0", units),), (Reader("1", units),))
    scores = magnitude_scores(model, group)
    expected = [np.linalg.norm(fc1.weight[i].detach()) * np.linalg.norm(fc2.weight[:, i].detach()) for i in range(5)]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    with torch.no_grad():
        fc1.weight[2] *= 8.0
        fc2.weight[:, 2] /= 8.0
    np.testing.assert_allclose(magnitude_scores(model, group), scores)


def test_random_scores_follow_seed_and_name_and_nest() -> None:
    scores = random_scores(50, "blocks.0.mlp", seed=3)
    np.testing.assert_array_equal(scores, random_scores(50, "blocks.0.mlp", seed=3))
    assert not np.array_equal(scores, random_scores(50, "blocks.0.mlp", seed=4))
    assert not np.array_equal(scores, random_scores(50, "blocks.1.mlp", seed=3))
    assert set(top(scores, 10)) < set(top(scores, 20))


def test_top_keeps_the_highest_in_order() -> None:
    np.testing.assert_array_equal(top(np.array([1.0, 5.0, 3.0, 5.0, 0.0]), 3), [1, 2, 3])
    np.testing.assert_array_equal(top(np.array([1.0, 1.0, 1.0]), 2), [0, 1])
