"""Entropic sparsification of the units that one or more layers read, from second moments.

Source: Barisin & Horenko, arXiv:2404.04734 (a layer is unfolded into a linear regression `Q = Lambda D(w)` whose inputs
are grouped by channel; entropy of w, L2 penalty). Differences from the paper:

- Only second moments of the layers' inputs and outputs are used (`Gram`).
- Inputs are centered and divided by their standard deviation; outputs are centered and divided by one common scale per
  layer (the root mean variance over its outputs). The data term is then the unexplained share of the output variance,
  so one `eps_w` means the same in every layer. The bias follows from the means.
- Several layers may read the same units (a residual stream). They share w, and each has its own Lambda; the data and L2
  terms are means over the layers. With one layer this is the published objective.
- The solver alternates in (Q, w) instead of (Lambda, w): for fixed w a group-weighted ridge on the active units, for fixed
  Q a separable problem on the simplex. Both steps are exact or majorizing, so the objective never rises. Iterates are
  extrapolated (`_ahead`), and the extrapolation is kept only if it lowers the objective.

Shapes: n units, k of them kept; per layer: c columns (inputs: c = n for a linear layer behind n neurons, 9 n for a 3 x
3 convolution, H W n for a linear layer behind flattened maps), m outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import wrightomega

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.criteria import Candidates
from lodeset.pruning.config import PruneJob
from lodeset.pruning.units.moments import CONSTANT_RATIO, Array, Indices, Moments, solve_positive

# Vanishing units shrink as w -> w^(4/3), so the exact cutoff matters little; it saves solving for dead units.
SUPPORT_FLOOR = 1e-6
LONGEST = 64.0  # largest step length of `_ahead`
FIRST_RUNG = 1e-5  # first strength of the ladder; each rung is twice the previous one
# Tolerance at intermediate rungs. At 1e-6, LeNet's 500 units end between .15 % lower and .8 % higher, for three times
# as many solves.
ON_THE_WAY = 1e-3


@dataclass(frozen=True)
class Layer:
    """A layer that reads the units: its moments, and the unit to which each of its columns belongs [c]."""

    name: str
    moments: Moments
    unit_of: Indices

    def covariance(self, units: int) -> Array:
        """Each unit's largest absolute covariance with any output, both scaled as the module docstring describes:
        [n].
        """
        moments, largest = self.moments, np.zeros(units)
        columns = np.flatnonzero(moments.varying)
        of_column = np.abs(moments.xy[columns]).max(axis=1) / np.sqrt(
            np.diag(moments.xx)[columns] * moments.var_y.mean()
        )
        np.maximum.at(largest, self.unit_of[columns], of_column)
        return largest


@dataclass(frozen=True)
class Rewritten:
    """The new weights of one layer, in its own scales: y ~ q x + bias."""

    q: Array  # [m, c]  zero for units that are not kept
    bias: Array  # [m]
    unexplained: float  # share of the outputs' variance left unexplained on the calibration positions


@dataclass(frozen=True)
class Solution:
    """The units that are kept, and the new weights of the layers that read them."""

    w: Array  # [n]     on the simplex, zero off the support
    support: Indices  # [k]     ascending
    layers: tuple[Rewritten, ...]  # in the order given
    history: tuple[float, ...]  # objective after each iteration, never rising
    converged: bool  # the last relative decrease was below the tolerance


@dataclass(frozen=True)
class Regression:
    """One standardized layer: correlations r [a, a] of inputs and g [a, m] of inputs with outputs, for the a columns
    whose units [a] may be kept.
    """

    r: Array
    g: Array
    unit_of: Indices
    c: int  # columns of the whole layer: the L2 term is a mean over all of them

    def ridge(self, w: Array, eps_l2: float) -> tuple[Array, float]:
        """The optimal B = Q^T [a, m] for fixed w [n], and the data and L2 terms there.

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
        """Each unit's contribution to the L2 term, times w^2: [n]."""
        squares = np.bincount(self.unit_of, np.sum(b**2, axis=1), minlength=units)
        return np.asarray(eps_l2 / (self.c * self.g.shape[1]) * squares)


@dataclass(frozen=True)
class Problem:
    """Layers that share the weights w of `units` units."""

    layers: tuple[Regression, ...]
    units: int
    eps_w: float
    eps_l2: float
    sign: int

    def ridge(self, w: Array) -> tuple[list[Array], float]:
        """Every layer's optimal B for fixed w [n], and the objective there."""
        solved = [layer.ridge(w, self.eps_l2) for layer in self.layers]
        kept = w[w > 0]
        entropy = self.sign * self.eps_w * float(np.sum(kept * np.log(kept)))
        return [b for b, _ in solved], float(np.mean([value for _, value in solved])) + entropy

    def weights(self, bs: Sequence[Array], w: Array) -> Array:
        """Return w [n] that lowers the objective for fixed B of every layer, starting from w; units whose B is zero get
        zero.

        If all of B is zero (no unit correlates with any output), w is unchanged.
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
    """Minimize sum_i cost_i / w_i^2 + sign * eps_w * w_i log w_i over the simplex, costs > 0.

    cost, w: [n]. eps_w = 0: closed form, w_i ~ cost_i^(1/3). sign = +1: convex; each w_i is a Wright omega function of
    the multiplier. sign = -1: one step of tangent majorization from w (entropy is concave, so its tangent lies above
    it).
    """
    if eps_w == 0.0:
        root = np.cbrt(cost / cost.max())
        return np.asarray(root / root.sum())
    # t is the multiplier. `at` returns the weights and how fast each one's logarithm falls as t grows. At the initial t
    # the weights sum to 1 or more.
    if sign > 0:
        # Stationary: -2 cost / w^3 + eps_w (log w + t) = 0, t = 1 + multiplier / eps_w.
        log_k = np.log(6.0 * cost / eps_w)
        t = float(np.max(2.0 * cost / eps_w))

        def at(t: float) -> tuple[Array, Array]:
            omega = wrightomega(3.0 * t + log_k)
            # omega + log(omega) = 3 t + log_k: the second form is exact where omega is tiny, the first where it is
            # large.
            log_w = np.where(omega > 1.0, (log_k - np.log(np.maximum(omega, 1.0))) / 3.0, omega / 3.0 - t)
            return np.exp(log_w), 1.0 / (1.0 + omega)

    else:
        # Stationary: -2 cost / w^3 + slope + t = 0, slopes shifted so that the smallest is 0 and t > 0.
        slope = -eps_w * np.log(w)
        slope -= slope.min()
        t = max(float(np.max(2.0 * cost - slope)), float(np.cbrt(2.0 * cost).sum() ** 3 - slope.max()))

        def at(t: float) -> tuple[Array, Array]:
            return np.cbrt(2.0 * cost / (slope + t)), 1.0 / (3.0 * (slope + t))

    # The logarithm of every weight is convex in t, and so is that of their sum: Newton steps from the left never pass
    # the root.
    weights, fall = at(t)
    while (total := float(weights.sum())) > 1.0:
        ahead = t + float(np.log(total) * total / (weights @ fall))
        if ahead <= t:
            break
        t = ahead
        weights, fall = at(t)
    return np.asarray(weights / weights.sum())


@dataclass(frozen=True)
class _Descent:
    """The end of one descent: w [n], B of every layer, and the objective after each iteration."""

    w: Array
    bs: list[Array]
    history: list[float]
    converged: bool


def _descend(problem: Problem, w: Array, max_iterations: int, tolerance: float) -> _Descent:
    """Alternate from w [n] until the objective settles; every third step tries `_ahead` of the last iterates and keeps
    it if it is lower.
    """
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
            trimmed = candidate  # the trimmed units still contributed: keep them for another round
            next_bs, objective = problem.ridge(candidate)
        if objective > history[-1]:
            return _Descent(w, bs, history, converged=True)  # the objective can only rise by rounding
        w, bs = trimmed, next_bs
        history.append(objective)
        steps.append(w)
        if history[-2] - objective <= tolerance * abs(objective):
            return _Descent(w, bs, history, converged=True)
    return _Descent(w, bs, history, converged=False)


def _trimmed(w: Array) -> Array:
    """w without the vanishing units, renormalized to the simplex."""
    kept = np.where(w > SUPPORT_FLOOR * w.max(), w, 0.0)
    return np.asarray(kept / kept.sum())


def _ahead(first: Array, second: Array, third: Array) -> Array | None:
    """Extrapolate three iterates with one SQUAREM step in log w (Varadhan & Roland 2008, scheme S3); None if the step
    would not be longer.

    The alternation converges linearly. With r the first step and v the difference between the second step and the
    first, the sequence goes to first + 2 a r + a^2 v, a = ||r|| / ||v||.
    """
    active = np.flatnonzero(third)
    log_1, log_2, log_3 = (np.log(w[active]) for w in (first, second, third))
    r, v = log_2 - log_1, log_3 - 2 * log_2 + log_1
    change = float(np.linalg.norm(v))
    if change == 0.0 or (a := min(LONGEST, float(np.linalg.norm(r)) / change)) <= 1.0:
        return None
    log_w = log_1 + 2 * a * r + a**2 * v
    w = np.zeros_like(third)
    w[active] = np.exp(log_w - log_w.max())
    return _trimmed(w)


@dataclass(frozen=True)
class _Scaled:
    """A layer's standardized regression, and the scales that undo the standardization."""

    layer: Layer
    regression: Regression
    columns: Indices  # columns of the regression: they vary, and their units may be kept
    scale_x: Array  # per column
    scale_y: float

    @classmethod
    def of(cls, layer: Layer) -> "_Scaled":
        moments = layer.moments
        columns = np.flatnonzero(moments.varying)
        level_y = (moments.var_y + moments.mean_y**2).mean()  # mean square of the outputs, including the offset
        scale_y = float(np.sqrt(moments.var_y.mean()))
        if len(columns) == 0 or scale_y**2 <= CONSTANT_RATIO * level_y:
            raise LodesetError(
                f"{layer.name}: {len(columns)} of {len(moments.mean_x)} inputs vary and the outputs' standard "
                "deviation is "
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
        """The regression restricted to units with weight: a removed unit never comes back, and a smaller problem is
        solved faster.
        """
        whole = self.regression
        active = np.flatnonzero(w[whole.unit_of])
        if len(active) == len(whole.unit_of):
            return self
        regression = Regression(whole.r[np.ix_(active, active)], whole.g[active], whole.unit_of[active], whole.c)
        return _Scaled(self.layer, regression, self.columns[active], self.scale_x[active], self.scale_y)

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
    """Descend from `below` if it is given; otherwise from uniform weights and from covariances, and return the lower
    end.
    """
    problem = Problem(tuple(layer.regression for layer in scaled), units, eps_w, eps_l2, sign)
    if below is not None:
        starts = [below]
    else:
        seen = np.bincount(np.concatenate([layer.regression.unit_of for layer in scaled]), minlength=units) > 0
        starts = [seen.astype(float), np.max([scaled_layer.layer.covariance(units) for scaled_layer in scaled], axis=0)]
    try:
        ends = [
            _descend(problem, start / start.sum(), max_iterations, tolerance) for start in starts if start.sum() > 0.0
        ]
    except np.linalg.LinAlgError as error:
        raise LodesetError(
            f"{', '.join(scaled_layer.layer.name for scaled_layer in scaled)}: units that repeat one another make the "
            "regression singular at "
            f"eps_L2 = {eps_l2:.2g}: raise l2_ratio"
        ) from error
    return min(ends, key=lambda end: end.history[-1])


def _solution(scaled: Sequence[_Scaled], end: _Descent) -> Solution:
    return Solution(
        w=end.w,
        support=np.flatnonzero(end.w).astype(np.int64),
        layers=tuple(layer.rewritten(b) for layer, b in zip(scaled, end.bs, strict=True)),
        history=tuple(end.history),
        converged=end.converged,
    )


def scores(units: Candidates) -> Array:
    """Score [n]: infinite for the units with weight; the others, which fill up the last multiple of `round_to`, by how
    much they say of an output by themselves.
    """
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
    """Minimize over w [n] on the simplex and Lambda [m, c] of every layer, with X and Y standardized as the module
    docstring describes:

        mean over layers of (1 / (T m) ||Y - Lambda D(w) X||^2 + eps_l2 / (c m) ||Lambda||^2) + sign * eps_w * sum_i w_i
        log w_i

    Descends from uniform weights and from each unit's largest absolute covariance with an output; the lower result
    wins. The problem is not convex: the result is a local minimum.

    Raises:
        LodesetError: a layer's inputs or outputs are constant, or eps_l2 is too small for linearly dependent units.
    """
    scaled = [_Scaled.of(layer) for layer in layers]
    return _solution(scaled, _best(scaled, units, eps_w, eps_l2, sign, max_iterations, tolerance, None))


def path(
    layers: Sequence[Layer], units: int, job: PruneJob, followed: dict[float, Array] | None = None
) -> dict[float, Solution]:
    """Solutions by eps_w, weakest penalty first. If `followed` is given, it receives w [n] at every strength along the
    path.

    The penalty grows along a ladder of fixed rungs, and each strength is solved starting from the rung below it.
    Growing it slowly reaches lower minima than starting at the target strength (2 to 5 % lower for LeNet's 500 units,
    benchmarks/lenet_2core-cpu_202611.md), a sweep shares the ladder, and the result at one strength does not depend on
    the other strengths of the sweep. A removed unit never comes back.

    eps_L2 is `job.l2_ratio * eps_w`: the sweep scales the whole penalty and keeps its shape.

    Raises:
        LodesetError: as `solve`.
    """
    scaled = [_Scaled.of(layer) for layer in layers]
    below: Array | None = None

    def from_below(eps_w: float, tolerance: float) -> _Descent:
        if below is not None:
            scaled[:] = [layer.within(below) for layer in scaled]
        eps_l2 = job.l2_ratio * eps_w
        return _best(scaled, units, eps_w, eps_l2, job.entropy_sign, job.max_iterations, tolerance, below)

    solutions: dict[float, Solution] = {}
    rung = FIRST_RUNG
    for eps_w in sorted(job.sweep):
        while rung < eps_w:
            below = from_below(rung, max(job.tolerance, ON_THE_WAY)).w
            if followed is not None:
                followed.setdefault(
                    rung, below
                )  # keep the precise solution if this rung is also a strength of the sweep
            rung *= 2
        solutions[eps_w] = _solution(scaled, from_below(eps_w, job.tolerance))
        if followed is not None:
            followed[eps_w] = solutions[eps_w].w
    return solutions
