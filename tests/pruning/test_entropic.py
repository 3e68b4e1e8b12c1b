"""The entropic solver against loops, brute force and a planted truth."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.entropic import Layer, Problem, Regression, Solution, _ahead, path, simplex_weights, solve
from lodeset.pruning.config import PruneJob
from lodeset.pruning.units.moments import Array, Gram, Indices


def gram_of(x: Array, y: Array) -> Gram:
    return Gram.from_activations(torch.from_numpy(x), torch.from_numpy(y))


def layer(x: Array, y: Array, columns_a_unit: int = 1) -> Layer:
    return Layer(
        "layer", gram_of(x, y).moments("layer"), np.repeat(np.arange(x.shape[1] // columns_a_unit), columns_a_unit)
    )


def quick(x: Array, y: Array, eps_w: float, eps_l2: float, sign: int, max_iterations: int = 500) -> Solution:
    return solve(
        [layer(x, y)], x.shape[1], eps_w=eps_w, eps_l2=eps_l2, sign=sign, max_iterations=max_iterations, tolerance=1e-12
    )


def planted(seed: int) -> tuple[Array, Array, Indices, Array]:
    """2000 positions of 64 AR(1)-correlated channels, of which 8 make the 10 outputs: x, y, those 8, true weights."""
    rng = np.random.default_rng(seed)
    innovations = rng.normal(size=(2000, 64))
    x = np.empty_like(innovations)
    x[:, 0] = innovations[:, 0]
    for i in range(1, 64):
        x[:, i] = 0.7 * x[:, i - 1] + np.sqrt(1 - 0.7**2) * innovations[:, i]
    support = np.sort(rng.choice(64, 8, replace=False))
    q = np.zeros((10, 64))
    q[:, support] = rng.normal(size=(10, 8))
    y = x @ q.T
    return x, y + 0.05 * y.std() * rng.normal(size=y.shape), support, q


def standardised(x: Array, y: Array) -> tuple[Array, Array]:
    x, y = x - x.mean(0), y - y.mean(0)
    return x / x.std(0), y / np.sqrt((y**2).mean())


def objective(x: Array, y: Array, lam: Array, w: Array, eps_w: float, eps_l2: float, sign: int) -> float:
    """The published objective, summed position by position on standardised x [T, n], y [T, m]."""
    t, n = x.shape
    m = y.shape[1]
    error = sum(float(np.sum((y[i] - lam @ (w * x[i])) ** 2)) for i in range(t))
    entropy = sum(float(v * np.log(v)) for v in w if v > 0)
    return float(error / (t * m) + sign * eps_w * entropy + eps_l2 / (n * m) * np.sum(lam**2))


def small_problem(seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 4)) @ rng.normal(size=(4, 4)) + rng.normal(size=4)
    y = x @ np.array([[1.0, -0.5], [0.0, 0.05], [0.4, 0.0], [0.0, 0.0]]) + 0.2 * rng.normal(size=(40, 2)) + 3.0
    return x, y


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_final_objective_is_the_published_one(sign: int) -> None:
    """What the solver minimises on Gram matrices equals the objective summed over positions."""
    x, y = small_problem(0)
    eps_w = 0.01 * abs(sign)
    solution = quick(x, y, eps_w, 0.01, sign)
    xs, ys = standardised(x, y)
    scale = x.std(0) / np.sqrt(((y - y.mean(0)) ** 2).mean())
    lam = np.zeros_like(solution.layers[0].q)
    lam[:, solution.support] = (solution.layers[0].q * scale)[:, solution.support] / solution.w[solution.support]
    assert solution.history[-1] == pytest.approx(objective(xs, ys, lam, solution.w, eps_w, 0.01, sign), abs=1e-12)


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_against_a_generic_solver_on_lambda_and_w(sign: int) -> None:
    """L-BFGS on (Lambda, softmax logits of w). The problem is not convex: from 8 random starts each it may find a
    slightly better local minimum, in few problems; started at the solution itself it must find nothing at all.
    """
    gaps = []
    for seed in range(5):
        x, y = small_problem(seed)
        xs, ys = standardised(x, y)
        eps_w, eps_l2 = 0.01 * abs(sign), 0.01

        def value(v: Array, xs: Array = xs, ys: Array = ys, eps_w: float = eps_w, eps_l2: float = eps_l2) -> float:
            lam, w = v[:8].reshape(2, 4), np.exp(v[8:] - v[8:].max())
            w = w / w.sum()
            error = np.mean((ys - xs @ (lam * w).T) ** 2)
            return float(error + sign * eps_w * np.sum(w * np.log(w + 1e-300)) + eps_l2 / 8 * np.sum(lam**2))

        solution = quick(x, y, eps_w, eps_l2, sign)
        reached = solution.history[-1]
        w = np.maximum(solution.w, 1e-12)
        lam = solution.layers[0].q * x.std(0) / np.sqrt(((y - y.mean(0)) ** 2).mean()) / w
        assert reached <= float(minimize(value, np.concatenate([lam.ravel(), np.log(w)])).fun) * (1 + 1e-6)
        rng = np.random.default_rng(seed)
        found = min(float(minimize(value, rng.normal(size=12)).fun) for _ in range(8))
        gaps.append(reached / found - 1)
    assert max(gaps) < 0.03
    assert np.median(gaps) < 1e-5


@pytest.mark.parametrize("sign", [-1, 1])
def test_simplex_weights_against_brute_force(sign: int) -> None:
    """sign +1: the minimum over a fine grid of the simplex. sign -1: iterated majorisation ends in a local minimum."""
    cost, eps_w = np.array([1e-3, 2e-4, 5e-6]), 0.02

    def value(w: Array) -> float:
        return float(np.sum(cost / w**2 + sign * eps_w * w * np.log(w)))

    w = np.full(3, 1 / 3)
    for _ in range(200):
        lower = simplex_weights(cost, w, eps_w, sign)
        assert value(lower) <= value(w) + 1e-15
        w = lower
    assert w.sum() == pytest.approx(1.0, abs=1e-12)
    if sign > 0:
        ticks = np.linspace(0.001, 0.998, 400)
        grid = min(value(np.array([a, b, 1 - a - b])) for a in ticks for b in ticks if a + b < 0.999)
        assert value(w) <= grid
    for direction in ([1, -1, 0], [0, 1, -1], [1, 0, -1]):
        for step in (1e-4, -1e-4):
            assert value(w) <= value(w + step * np.array(direction))


@pytest.mark.parametrize("sign", [-1, 1])
def test_simplex_weights_are_stationary_over_60_orders_of_magnitude(sign: int) -> None:
    """The derivative in every weight is the same, which rescaling a point that is not the minimum onto the simplex would not give."""
    rng = np.random.default_rng(0)
    for eps_w in (1e-5, 1e-2, 1.0):
        cost, before = 10 ** rng.uniform(-60, 0, 512), 10 ** rng.uniform(-12, 0, 512)
        before /= before.sum()
        w = simplex_weights(cost, before, eps_w, sign)
        assert w.min() > 0 and w.sum() == pytest.approx(1.0)
        terms = -2 * cost / w**3, sign * eps_w * np.log(w if sign > 0 else before)
        size = np.abs(terms[0]) + np.abs(terms[1])
        slopes = terms[0] + terms[1]
        multiplier = np.median(slopes)
        assert np.abs(slopes - multiplier).max() <= 1e-9 * (size.max() + abs(multiplier))


def test_closed_form_without_entropy_is_the_two_thirds_power() -> None:
    """eps_w = 0: w ~ ||Q_i||^(2/3) and the penalty becomes (sum ||Q_i||^(2/3))^3, below every other point tried."""
    norms = np.array([3.0, 1.0, 0.2])
    w = simplex_weights(norms**2, np.full(3, 1 / 3), 0.0, -1)
    np.testing.assert_allclose(w, norms ** (2 / 3) / np.sum(norms ** (2 / 3)))
    assert np.sum(norms**2 / w**2) == pytest.approx(np.sum(norms ** (2 / 3)) ** 3)
    others = np.random.default_rng(0).dirichlet(np.ones(3), size=1000)
    assert np.all(np.sum(norms**2 / others**2, axis=1) >= np.sum(norms ** (2 / 3)) ** 3)


@pytest.mark.parametrize("sign", [-1, 1])
def test_each_half_step_lowers_the_objective(sign: int) -> None:
    """The plain alternation, without the solver's own acceptance test."""
    x, y, _, _ = planted(1)
    xs, ys = standardised(x, y)
    regression = Regression(xs.T @ xs / len(xs), xs.T @ ys / len(xs), np.arange(64), c=64)
    problem = Problem((regression,), 64, eps_w=1e-3, eps_l2=1e-3, sign=sign)
    w, values = np.full(64, 1 / 64), []
    for _ in range(12):
        b, value = problem.ridge(w)
        values.append(value)
        w = problem.weights(b, w)
    assert all(after <= before + 1e-12 for before, after in pairwise(values))
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("seed", range(5))
def test_planted_support_is_recovered(seed: int) -> None:
    """8 true channels of 64 at correlation 0.7 and 5 % noise, the number of channels unknown to the solver."""
    x, y, support, q = planted(seed)
    solution = path([layer(x, y)], 64, PruneJob())[1e-3]
    np.testing.assert_array_equal(solution.support, support)
    assert solution.converged
    assert solution.layers[0].unexplained < 1.2 * 0.05**2
    assert np.abs(solution.layers[0].q - q).max() < 0.05 * np.abs(q).max()


def test_a_stronger_penalty_keeps_fewer_channels() -> None:
    x, y, _, _ = planted(0)
    kept = [len(s.support) for s in path([layer(x, y)], 64, PruneJob(sweep=(1e-2, 1e-5, 1e-4, 0.3))).values()]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 64
    assert kept[-1] < 8


def test_a_strength_gives_the_same_whatever_else_is_swept() -> None:
    x, y, _, _ = planted(4)
    alone = path([layer(x, y)], 64, PruneJob(sweep=(3e-2,)))[3e-2]
    swept = path([layer(x, y)], 64, PruneJob(sweep=(1e-6, 1e-3, 2e-3, 3e-2, 0.3)))
    np.testing.assert_array_equal(alone.w, swept[3e-2].w)
    supports = [set(swept[eps].support) for eps in sorted(swept)]
    assert all(stronger <= weaker for weaker, stronger in pairwise(supports)) and supports[-1] < supports[0]


def test_growing_the_penalty_ends_as_low_as_starting_at_it() -> None:
    gains = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = np.maximum(rng.normal(size=(1500, 12)) @ rng.normal(size=(12, 60)) + rng.normal(size=60), 0)
        y = x @ rng.normal(size=(60, 4)) + rng.normal(size=(1500, 4))
        along = path([layer(x, y)], 60, PruneJob(sweep=(1e-2,)))[1e-2].history[-1]
        gains.append(1 - along / quick(x, y, 1e-2, 1e-2, -1).history[-1])
    assert min(gains) > -0.02 and np.mean(gains) > -0.005


def test_channels_that_still_carry_output_survive_the_floor() -> None:
    """Almost no L2 penalty: one channel takes the simplex, the others' tiny w are compensated by a large Lambda."""
    x, y, _, _ = planted(0)
    solution = quick(x, y, 1e-3, 1e-19, -1)
    assert np.sort(solution.w)[-2] < 1e-6
    assert solution.layers[0].unexplained < 1.2 * 0.05**2


def test_units_and_offsets_of_the_channels_do_not_matter() -> None:
    x, y, support, q = planted(2)
    rng = np.random.default_rng(0)
    scale, offset = 10.0 ** rng.uniform(-3, 3, size=64), rng.normal(size=64) * 5
    plain = quick(x, y, 1e-3, 1e-3, -1)
    moved = quick((x + offset) * scale, 100 * y + 7, 1e-3, 1e-3, -1)
    np.testing.assert_array_equal(moved.support, support)
    np.testing.assert_allclose(moved.layers[0].q * scale, 100 * plain.layers[0].q, atol=1e-4 * 100 * np.abs(q).max())
    predicted = ((x + offset) * scale) @ moved.layers[0].q.T + moved.layers[0].bias
    assert np.mean((predicted - 100 * y - 7) ** 2) < 1.2 * 0.05**2 * np.var(100 * y)


def test_constant_and_duplicate_channels() -> None:
    """A constant channel is dropped and its level goes into the bias; two equal channels make the Gram singular."""
    x, y, support, _ = planted(3)
    x = np.column_stack([x, np.full(len(x), 4.0), np.zeros(len(x)), x[:, support[0]]])
    solution = quick(x, y, 1e-3, 1e-3, -1)
    assert 64 not in solution.support
    assert 65 not in solution.support
    assert set(solution.support) - {66} <= set(support)
    assert np.isfinite(solution.layers[0].q).all()
    assert np.mean((x @ solution.layers[0].q.T + solution.layers[0].bias - y) ** 2) / y.var() < 0.01


def test_too_few_positions_are_refused_with_the_number() -> None:
    x, y, _, _ = planted(0)
    with pytest.raises(LodesetError, match=r"layer: 65 calibration positions cannot determine 64 .* more than 65"):
        quick(x[:65], y[:65], 1e-3, 1e-3, -1)
    assert np.isfinite(quick(x[:66], y[:66], 1e-3, 1e-3, -1).layers[0].q).all()


def test_unusable_activations_are_refused() -> None:
    x, y, _, _ = planted(0)
    with pytest.raises(LodesetError, match="infinities or NaN"):
        quick(np.where(x > 3, np.inf, x), y, 1e-3, 1e-3, -1)
    with pytest.raises(LodesetError, match="outputs' standard deviation is 0"):
        quick(x, np.zeros_like(y), 1e-3, 1e-3, -1)
    with pytest.raises(LodesetError, match="0 of 64 inputs vary"):
        quick(np.ones_like(x), y, 1e-3, 1e-3, -1)


def test_repeated_channels_without_enough_penalty_are_refused() -> None:
    x, y, _, _ = planted(0)
    with pytest.raises(LodesetError, match=r"layer: units that repeat .* eps_L2 = 1e-30: raise l2_ratio"):
        quick(np.column_stack([x, x]), y, 0.0, 1e-30, -1)


def test_outputs_that_no_channel_explains() -> None:
    """A full factorial design: y is the product of the channels, exactly uncorrelated with each."""
    x = np.array([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    solution = quick(x, x[:, :1] * x[:, 1:], 1e-3, 1e-3, -1)
    assert solution.converged
    assert solution.layers[0].unexplained == 1.0
    assert not solution.layers[0].q.any()


def test_an_unfinished_solve_says_so() -> None:
    x, y, _, _ = planted(0)
    short = quick(x, y, 1e-3, 1e-3, -1, max_iterations=2)
    assert not short.converged
    assert len(short.history) == 3


def test_units_of_several_columns_are_kept_or_dropped_whole() -> None:
    """3 columns a unit, of which one may do by itself: the others of a kept unit keep their weights too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 20, 3)) + 0.7 * rng.normal(size=(3000, 20, 1))
    q = np.zeros((6, 20, 3))
    support = np.array([2, 5, 11, 17])
    q[:, support] = rng.normal(size=(6, 4, 3))
    y = x.reshape(3000, 60) @ q.reshape(6, 60).T
    y += 0.05 * y.std() * rng.normal(size=y.shape)
    solution = path([layer(x.reshape(3000, 60), y, 3)], 20, PruneJob())[1e-3]
    np.testing.assert_array_equal(solution.support, support)
    np.testing.assert_allclose(solution.layers[0].q.reshape(6, 20, 3), q, atol=0.05 * np.abs(q).max())


@pytest.mark.parametrize("sign", [-1, 1])
def test_layers_that_read_the_same_units_share_their_weights(sign: int) -> None:
    """The objective is the mean over the layers; a unit that one layer alone needs is kept for both."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2000, 30))
    first, second = np.zeros((5, 30)), np.zeros((7, 30))
    first[:, [1, 4, 8]], second[:, [4, 20]] = rng.normal(size=(5, 3)), rng.normal(size=(7, 2))
    ys = [x @ q.T + 0.02 * rng.normal(size=(2000, len(q))) for q in (first, second)]
    found = solve(
        [layer(x, y) for y in ys], 30, eps_w=1e-3, eps_l2=1e-3, sign=sign, max_iterations=500, tolerance=1e-12
    )
    if sign < 0:
        np.testing.assert_array_equal(found.support, [1, 4, 8, 20])
    total = sign * 1e-3 * np.sum(found.w[found.support] * np.log(found.w[found.support]))
    for y, rewritten in zip(ys, found.layers, strict=True):
        xs, scaled = standardised(x, y)
        lam = np.zeros_like(rewritten.q)
        scale = x.std(0) / np.sqrt(((y - y.mean(0)) ** 2).mean())
        lam[:, found.support] = (rewritten.q * scale)[:, found.support] / found.w[found.support]
        total += objective(xs, scaled, lam, found.w, 0.0, 1e-3, sign) / 2
    assert found.history[-1] == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_a_planted_support_is_found_without_its_size(seed: int) -> None:
    """256 channels, 32 true, 64 outputs, 4,096 positions, correlation .7 between neighbours, 5 % noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4096, 256))
    for i in range(1, 256):
        x[:, i] = 0.7 * x[:, i - 1] + np.sqrt(1 - 0.7**2) * x[:, i]
    support = np.sort(rng.choice(256, 32, replace=False))
    y = x[:, support] @ rng.normal(size=(32, 64))
    y += 0.05 * y.std() * rng.normal(size=y.shape)
    solution = path([layer(x, y)], 256, PruneJob(sweep=(1e-3,)))[1e-3]
    np.testing.assert_array_equal(solution.support, support)


def test_extrapolation_of_what_converges_linearly_is_its_limit() -> None:
    rng = np.random.default_rng(0)
    limit, offset = rng.normal(size=7), rng.normal(size=7)
    iterates = [np.exp(limit + offset * 0.9**k) for k in range(3)]
    found = _ahead(*(np.append(w, 0.0) for w in iterates))
    assert found is not None and found[-1] == 0
    np.testing.assert_allclose(found[:-1], np.exp(limit) / np.exp(limit).sum(), rtol=1e-9)
    assert _ahead(*(np.append(np.exp(limit), 0.0),) * 3) is None  # what stands still is not hurried


def test_extrapolation_saves_solves_and_ends_as_low(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every channel says a little of every output, the alternation is slow."""
    ends = []
    for ahead in (_ahead, lambda *_: None):
        monkeypatch.setattr("lodeset.pruning.choosing.entropic._ahead", ahead)
        solved = []
        for seed in range(3):
            x, _, _, _ = planted(seed)
            rng = np.random.default_rng(seed)
            y = x @ (rng.normal(size=(64, 10)) * rng.random((64, 1))) + rng.normal(size=(2000, 10))
            solved.append(quick(x, y, 1e-3, 1e-3, -1))
        assert all(all(b <= a for a, b in pairwise(one.history)) for one in solved)
        ends.append((sum(len(one.history) for one in solved), [one.history[-1] for one in solved]))
    (quickly, low), (slowly, as_low) = ends
    assert quickly < 0.8 * slowly
    np.testing.assert_allclose(low, as_low, rtol=1e-3)
