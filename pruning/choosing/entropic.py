"""Entropic sparsification of the units that one or more layers read, from second moments.

Source: Barisin & Horenko, arXiv:2404.04734 (a layer is unfolded into a linear regression `Q = Lambda D(w)` whose inputs are
grouped by channel; entropy of w, L2 penalty). Here:

- Only second moments of the layers' inputs and outputs are used (`Gram`).
- Inputs are centred and divided by their standard deviation, outputs are centred and divided by one common scale a layer (the
  root mean variance over its outputs). The data term is then the share of the output variance left unexplained, and one
  `eps_w` means the same in every layer. The bias follows from the means.
- Several layers may read the same units (a residual stream): they share w, and each has a Lambda of its own; data and L2 terms are
  means over the layers. With one layer this is the published objective.
- The problem is alternated in (Q, w) instead of (Lambda, w): for fixed w a group-weighted ridge on the active units, for fixed Q a
  separable problem on the simplex. Both steps are exact or majorising, so the objective never rises. Iterates are extrapolated
  (`_ahead`); what that gives is kept where the objective is lower.

Shapes: n units, k of them kept; of a layer: c columns (inputs: c = n for a linear layer behind n neurons, 9 n for a 3 x 3
convolution, H W n for a linear layer behind flattened maps), m outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import wrightomega

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.criteria import Candidates
from lodeset.pruning.config import PruneJob
from lodeset.pruning.units.moments import CONSTANT_RATIO, Array, Indices, Moments, solve_positive

# Units on their way out shrink as w -> w^(4/3), so the exact cut matters little; it saves solving for dead units.
SUPPORT_FLOOR = 1e-6
LONGEST = 64.0  # steps that `_ahead` may take at once
FIRST_RUNG = 1e-5  # of the strengths at which a path is followed, each twice the one before
# Tolerance at the rungs, where a path only passes. With 1e-6 there LeNet's 500 units end .15 % lower to .8 % higher, for three times as many solves.
ON_THE_WAY = 1e-3


@dataclass(frozen=True)
class Layer:
    """A layer that reads the units: its moments, and the unit that each of its columns belongs to [c]."""

    name: str
    moments: Moments
    unit_of: Indices

    def covariance(self, units: int) -> Array:
        """Each unit's largest absolute covariance with an output, both scaled as the module says: [n]."""
        moments, found = self.moments, np.zeros(units)
        columns = np.flatnonzero(moments.varying)
        of_column = np.abs(moments.xy[columns]).max(axis=1) / np.sqrt(
            np.diag(moments.xx)[columns] * moments.var_y.mean()
        )
        np.maximum.at(found, self.unit_of[columns], of_column)
        return found


@dataclass(frozen=True)
class Rewritten:
    """What becomes of one layer, in its own scales: y ~ q x + bias."""

    q: Array  # [m, c]  zero for units that are not kept
    bias: Array  # [m]
    unexplained: float  # share of the outputs' variance left unexplained on the calibration positions


@dataclass(frozen=True)
class Solution:
    """Which units are kept, and what becomes of the layers that read them."""

    w: Array  # [n]     on the simplex, zero off the support
    support: Indices  # [k]     ascending
    layers: tuple[Rewritten, ...]  # in the order given
    history: tuple[float, ...]  # objective after each iteration, never rising
    converged: bool  # the last relative decrease was below the tolerance


@dataclass(frozen=True)
class Regression:
    """One layer, standardised: correlations r [a, a] of inputs, g [a, m] of inputs with outputs, of a columns whose units [a] may be kept."""

    r: Array
    g: Array
    unit_of: Indices
    c: int  # columns of the layer: the L2 term is a mean over them all

    def ridge(self, w: Array, eps_l2: float) -> tuple[Array, float]:
        """B = Q^T [a, m] that is best for fixed w [n], and the data and L2 terms there.

        Solved in Lambda = Q / w, where the matrix D r D + (eps_l2 / c) I stays well conditioned as w goes to zero.
        The normal equations give data term + L2 term = 1 - <B, g> / m.
        """
        b = np.zeros_like(self.g)
        of_column = w[self.unit_of]
        active = np.flatnonzero(of_column)
        w_a = of_column[active]
        matrix = self.r[np.ix_(active, active)]
        matrix *= w_a
        matrix *= w_a[:, None]
        np.einsum("ii->i", matrix)[:] += eps_l2 / self.c
        g_a = self.g[active]
        b[active] = w_a[:, None] * solve_positive(matrix, w_a[:, None] * g_a)
        return b, 1.0 - float(np.sum(b[active] * g_a)) / self.g.shape[1]

    def cost(self, b: Array, units: int, eps_l2: float) -> Array:
        """What each unit's share of the L2 term is, times w^2: [n]."""
        squares = np.bincount(self.unit_of, np.sum(b**2, axis=1), minlength=units)
        return np.asarray(eps_l2 / (self.c * self.g.shape[1]) * squares)


@dataclass(frozen=True)
class Problem:
    """Layers that share w over `units` units."""

    layers: tuple[Regression, ...]
    units: int
    eps_w: float
    eps_l2: float
    sign: int

    def ridge(self, w: Array) -> tuple[list[Array], float]:
        """Every layer's B that is best for fixed w [n], and the objective there."""
        solved = [layer.ridge(w, self.eps_l2) for layer in self.layers]
        kept = w[w > 0]
        entropy = self.sign * self.eps_w * float(np.sum(kept * np.log(kept)))
        return [b for b, _ in solved], float(np.mean([value for _, value in solved])) + entropy

    def weights(self, bs: Sequence[Array], w: Array) -> Array:
        """w [n] that lowers the objective for fixed B of every layer, starting from w; units without any B get zero.

        When all of B is zero (outputs that no unit correlates with), w stays.
        """
        costs = [layer.cost(b, self.units, self.eps_l2) for layer, b in zip(self.layers, bs, strict=True)]
        cost = np.mean(costs, axis=0)
        active = np.flatnonzero(cost)
        if len(active) == 0:
            return w
        out = np.zeros(self.units)
        out[active] = simplex_weights(cost[active], w[active], self.eps_w, self.sign)
        return out


def simplex_weights(cost: Array, w: Array, eps_w: float, sign: int) -> Array:
    """Minimise sum_i cost_i / w_i^2 + sign * eps_w * w_i log w_i over the simplex, costs > 0.

    cost, w: [n]. eps_w = 0: closed form, w_i ~ cost_i^(1/3). sign = +1: convex; each w_i is a Wright omega function of
    the multiplier. sign = -1: one step of tangent majorisation from w (entropy is concave: its tangent lies above it).
    """
    if eps_w == 0.0:
        root = np.cbrt(cost / cost.max())
        return np.asarray(root / root.sum())
    # t is the multiplier; `at` gives the weights and how fast the logarithm of each falls as t grows. At `t` as it stands their sum is 1 or more.
    if sign > 0:
        # Stationary: -2 cost / w^3 + eps_w (log w + t) = 0, t = 1 + multiplier / eps_w.
        log_k = np.log(6.0 * cost / eps_w)
        t = float(np.max(2.0 * cost / eps_w))

        def at(t: float) -> tuple[Array, Array]:
            omega = wrightomega(3.0 * t + log_k)
            # omega + log(omega) = 3 t + log_k: the second form is exact where omega is tiny, the first where it is large.
            log_w = np.where(omega > 1.0, (log_k - np.log(np.maximum(omega, 1.0))) / 3.0, omega / 3.0 - t)
            return np.exp(log_w), 1.0 / (1.0 + omega)

    else:
        # Stationary: -2 cost / w^3 + slope + t = 0, slopes shifted so that the smallest is 0 and t > 0.
        slope = -eps_w * np.log(w)
        slope -= slope.min()
        t = max(float(np.max(2.0 * cost - slope)), float(np.cbrt(2.0 * cost).sum() ** 3 - slope.max()))

        def at(t: float) -> tuple[Array, Array]:
            return np.cbrt(2.0 * cost / (slope + t)), 1.0 / (3.0 * (slope + t))

    # The logarithm of every weight is convex in t, so that of their sum is too: Newton's steps from the left never pass the root.
    found, fall = at(t)
    while (total := float(found.sum())) > 1.0:
        ahead = t + float(np.log(total) * total / (found @ fall))
        if ahead <= t:
            break
        t = ahead
        found, fall = at(t)
    return np.asarray(found / found.sum())


@dataclass(frozen=True)
class _Descent:
    """Where one start ended: w [n], B of every layer, the objective after each iteration."""

    w: Array
    bs: list[Array]
    history: list[float]
    converged: bool


def _descend(problem: Problem, w: Array, max_iterations: int, tolerance: float) -> _Descent:
    """Alternate from w [n] until the objective settles; every third step is `_ahead` of the two before it, where that ends lower."""
    bs, objective = problem.ridge(w)
    history, steps = [objective], [w]
    for _ in range(max_iterations):
        if len(steps) == 3:
            candidate = _ahead(*steps)
            steps = [w]
            if candidate is not None:
                next_bs, objective = problem.ridge(candidate)
                if objective < history[-1]:
                    w, bs, steps = candidate, next_bs, [candidate]
                    history.append(objective)
                    continue
        candidate = problem.weights(bs, w)
        trimmed = _trimmed(candidate)
        next_bs, objective = problem.ridge(trimmed)
        if objective > history[-1] and np.any(trimmed != candidate):
            trimmed = candidate  # the cut units still carried something: keep them another round
            next_bs, objective = problem.ridge(candidate)
        if objective > history[-1]:
            return _Descent(w, bs, history, converged=True)  # neither step can rise but by rounding
        w, bs = trimmed, next_bs
        history.append(objective)
        steps.append(w)
        if history[-2] - objective <= tolerance * abs(objective):
            return _Descent(w, bs, history, converged=True)
    return _Descent(w, bs, history, converged=False)


def _trimmed(w: Array) -> Array:
    """Without the units that are on their way out; on the simplex."""
    left = np.where(w > SUPPORT_FLOOR * w.max(), w, 0.0)
    return np.asarray(left / left.sum())


def _ahead(first: Array, second: Array, third: Array) -> Array | None:
    """Where three iterates lead, or None where they do not hurry: one step of SQUAREM (Varadhan & Roland 2008, scheme S3), in log w.

    The alternation converges linearly. With r the first step and v how much the second differs from it, the sequence goes to
    first + 2 a r + a^2 v, a = ||r|| / ||v||.
    """
    left = np.flatnonzero(third)
    one, two, three = (np.log(w[left]) for w in (first, second, third))
    r, v = two - one, three - 2 * two + one
    turn = float(np.linalg.norm(v))
    if turn == 0.0 or (a := min(LONGEST, float(np.linalg.norm(r)) / turn)) <= 1.0:
        return None
    log_w = one + 2 * a * r + a**2 * v
    w = np.zeros_like(third)
    w[left] = np.exp(log_w - log_w.max())
    return _trimmed(w)


@dataclass(frozen=True)
class _Scaled:
    """A layer's regression, and the way back to its own scales."""

    layer: Layer
    regression: Regression
    columns: Indices  # those that `regression` is of: that vary, and whose units may be kept
    scale_x: Array  # of these columns
    scale_y: float

    @classmethod
    def of(cls, layer: Layer) -> "_Scaled":
        moments = layer.moments
        columns = np.flatnonzero(moments.varying)
        level_y = (moments.var_y + moments.mean_y**2).mean()  # mean square of the outputs, the offset included
        scale_y = float(np.sqrt(moments.var_y.mean()))
        if len(columns) == 0 or scale_y**2 <= CONSTANT_RATIO * level_y:
            raise LodesetError(
                f"{layer.name}: {len(columns)} of {len(moments.mean_x)} inputs vary and the outputs' standard deviation is "
                f"{scale_y:.2g} over {moments.count} positions: calibrate on images that differ"
            )
        scale_x = np.sqrt(np.diag(moments.xx)[columns])
        regression = Regression(
            r=moments.xx[np.ix_(columns, columns)] / np.outer(scale_x, scale_x),
            g=moments.xy[columns] / (scale_x[:, None] * scale_y),
            unit_of=layer.unit_of[columns],
            c=len(columns),
        )
        return cls(layer, regression, columns, scale_x, scale_y)

    def within(self, w: Array) -> "_Scaled":
        """Of the units with weight alone: a unit that is gone does not come back, and what is small is solved faster."""
        whole = self.regression
        left = np.flatnonzero(w[whole.unit_of])
        if len(left) == len(whole.unit_of):
            return self
        regression = Regression(whole.r[np.ix_(left, left)], whole.g[left], whole.unit_of[left], whole.c)
        return _Scaled(self.layer, regression, self.columns[left], self.scale_x[left], self.scale_y)

    def rewritten(self, b: Array) -> Rewritten:
        moments = self.layer.moments
        q = np.zeros((len(moments.mean_y), len(moments.mean_x)))
        q[:, self.columns] = (b * (self.scale_y / self.scale_x[:, None])).T
        bias = moments.mean_y - q @ moments.mean_x
        return Rewritten(q, bias, moments.unexplained(q, bias))


def _best(
    scaled: Sequence[_Scaled],
    units: int,
    eps_w: float,
    eps_l2: float,
    sign: int,
    max_iterations: int,
    tolerance: float,
    below: Array | None,
) -> _Descent:
    """From the weights `below` where they are given; else from uniform ones and from covariances, whichever ends lower."""
    problem = Problem(tuple(one.regression for one in scaled), units, eps_w, eps_l2, sign)
    if below is not None:
        starts = [below]
    else:
        seen = np.bincount(np.concatenate([one.regression.unit_of for one in scaled]), minlength=units) > 0
        starts = [seen.astype(float), np.max([one.layer.covariance(units) for one in scaled], axis=0)]
    try:
        ends = [
            _descend(problem, start / start.sum(), max_iterations, tolerance) for start in starts if start.sum() > 0.0
        ]
    except np.linalg.LinAlgError as error:
        raise LodesetError(
            f"{', '.join(one.layer.name for one in scaled)}: units that repeat one another leave the regression singular at "
            f"eps_L2 = {eps_l2:.2g}: raise l2_ratio"
        ) from error
    return min(ends, key=lambda end: end.history[-1])


def _solution(scaled: Sequence[_Scaled], end: _Descent) -> Solution:
    return Solution(
        w=end.w,
        support=np.flatnonzero(end.w).astype(np.int64),
        layers=tuple(one.rewritten(b) for one, b in zip(scaled, end.bs, strict=True)),
        history=tuple(end.history),
        converged=end.converged,
    )


def scores(units: Candidates) -> Array:
    """Score [n]: infinite for the units with weight; the others, which fill up the last multiple of `round_to`, by how much they say of
    an output by themselves."""
    by_themselves = np.max([layer.covariance(units.group.units) for layer in units.layers], axis=0)
    return np.where(units.solution.w > 0, np.inf, by_themselves)


def solve(
    layers: Sequence[Layer],
    units: int,
    *,
    eps_w: float,
    eps_l2: float,
    sign: int,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """Minimise over w [n] on the simplex and Lambda [m, c] of every layer, X and Y standardised as the module says:

        mean over layers of (1 / (T m) ||Y - Lambda D(w) X||^2 + eps_l2 / (c m) ||Lambda||^2) + sign * eps_w * sum_i w_i log w_i

    Descends from uniform weights and from each unit's largest absolute covariance with an output; the lower objective wins. The
    problem is not convex: the result is a local minimum.

    Raises:
        LodesetError: a layer whose inputs or outputs are constant, or an eps_l2 too small for units that depend on one another.
    """
    scaled = [_Scaled.of(layer) for layer in layers]
    return _solution(scaled, _best(scaled, units, eps_w, eps_l2, sign, max_iterations, tolerance, None))


def path(
    layers: Sequence[Layer], units: int, job: PruneJob, followed: dict[float, Array] | None = None
) -> dict[float, Solution]:
    """Solutions by eps_w, weakest penalty first. w [n] at every strength on the way is put into `followed`.

    The penalty grows along a ladder of fixed rungs, and each strength is solved from the rung below it. Growing it slowly ends in lower
    minima than starting at a strength (LeNet's 500 units: by 2 to 5 %, benchmarks/lenet_2core-cpu_202611.md), a sweep shares the
    ladder, and what a strength gives does not depend on the others of the sweep. A unit that is gone does not come back.

    eps_L2 is `job.l2_ratio * eps_w`: the sweep scales the whole penalty and keeps its shape.

    Raises:
        LodesetError: as `solve`.
    """
    scaled = [_Scaled.of(layer) for layer in layers]
    below: Array | None = None

    def from_below(eps_w: float, tolerance: float) -> _Descent:
        if below is not None:
            scaled[:] = [one.within(below) for one in scaled]
        eps_l2 = job.l2_ratio * eps_w
        return _best(scaled, units, eps_w, eps_l2, job.entropy_sign, job.max_iterations, tolerance, below)

    solutions: dict[float, Solution] = {}
    rung = FIRST_RUNG
    for eps_w in sorted(job.sweep):
        while rung < eps_w:
            below = from_below(rung, max(job.tolerance, ON_THE_WAY)).w
            if followed is not None:
                followed.setdefault(rung, below)  # a strength of the sweep that is a rung was solved closely
            rung *= 2
        solutions[eps_w] = _solution(scaled, from_below(eps_w, job.tolerance))
        if followed is not None:
            followed[eps_w] = solutions[eps_w].w
    return solutions
