"""Entropic sparsification of a linear layer from its Gram matrices.

Source: Barisin & Horenko, arXiv:2404.04734 (layer-wise regression `Q = Lambda D(w)`, entropy of w, L2 penalty). Here:

- Only second moments of the layer's inputs and outputs are used (`Gram`). They add up over images and workers, so every
  strength of the penalty is solved without touching the images again.
- Inputs are centred and divided by their standard deviation, outputs are centred and divided by one common scale (the
  root mean variance over outputs). The data term is then the share of the output variance left unexplained, and one
  `eps_w` means the same in every layer. The bias follows from the means.
- The problem is alternated in (Q, w) instead of (Lambda, w): for fixed w a group-weighted ridge on the active channels,
  for fixed Q a separable problem on the simplex. Both steps are exact or majorising, so the objective never rises.

Shapes: T positions, n input channels (hidden units), m outputs, k channels kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import wrightomega

from pipeline.errors import LodesetError
from pruning.config import PruneJob

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# float32 activations that are constant up to rounding have var / E[x^2] near 1e-14.
CONSTANT_RATIO = 1e-12
# Channels on their way out shrink as w -> w^(4/3), so the exact cut matters little; it saves solving for dead channels.
SUPPORT_FLOOR = 1e-6


@dataclass(frozen=True)
class Gram:
    """Sums over T positions of a layer's inputs x and outputs y, in float64; `+` joins disjoint sets of positions.

    An n = 1536, m = 384 layer takes 24 MB, an n = 4096, m = 1024 layer 168 MB.
    """

    xx: Array  # [n, n]  sum of x x^T
    xy: Array  # [n, m]  sum of x y^T
    yy: Array  # [m]     sum of y^2
    sum_x: Array  # [n]
    sum_y: Array  # [m]
    count: int  # T

    @classmethod
    def from_activations(cls, x: torch.Tensor, y: torch.Tensor) -> "Gram":
        """Sums over the rows of x [T, n] and y [T, m], computed in float64 on the tensors' device."""
        x, y = x.detach().double(), y.detach().double()
        return cls(
            xx=(x.T @ x).cpu().numpy(),
            xy=(x.T @ y).cpu().numpy(),
            yy=y.square().sum(0).cpu().numpy(),
            sum_x=x.sum(0).cpu().numpy(),
            sum_y=y.sum(0).cpu().numpy(),
            count=len(x),
        )

    def __add__(self, other: "Gram") -> "Gram":
        return Gram(
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
            self.sum_x + other.sum_x,
            self.sum_y + other.sum_y,
            self.count + other.count,
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything by name, for `numpy.savez` or safetensors."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Gram":
        """The inverse of `arrays`."""
        sums = {f.name: np.asarray(arrays[f.name], dtype=np.float64) for f in fields(cls) if f.name != "count"}
        return cls(**sums, count=int(arrays["count"]))

    def moments(self, name: str) -> "Moments":
        """Covariances of the positions seen.

        Raises:
            LodesetError: the sums are not finite, or there are too few positions for n weights and a bias an output.
        """
        n = len(self.sum_x)
        if not all(np.isfinite(a).all() for a in (self.xx, self.xy, self.yy, self.sum_x, self.sum_y)):
            raise LodesetError(
                f"{name}: the calibration activations hold infinities or NaN: "
                "check the checkpoint, or calibrate in float32"
            )
        if self.count <= n + 1:
            raise LodesetError(
                f"{name}: {self.count} calibration positions cannot determine {n} weights and a bias an output: "
                f"take more than {n + 1} (raise calibration_images or positions_per_image)"
            )
        mean_x, mean_y = self.sum_x / self.count, self.sum_y / self.count
        return Moments(
            xx=self.xx / self.count - np.outer(mean_x, mean_x),
            xy=self.xy / self.count - np.outer(mean_x, mean_y),
            var_y=np.maximum(self.yy / self.count - mean_y**2, 0.0),
            mean_x=mean_x,
            mean_y=mean_y,
            varying=np.diag(self.xx) / self.count - mean_x**2 > CONSTANT_RATIO * np.diag(self.xx) / self.count,
        )


@dataclass(frozen=True)
class Moments:
    """Covariances of a layer's inputs and outputs, and which inputs vary at all."""

    xx: Array  # [n, n]
    xy: Array  # [n, m]
    var_y: Array  # [m]
    mean_x: Array  # [n]
    mean_y: Array  # [m]
    varying: npt.NDArray[np.bool_]  # [n]

    def unexplained(self, q: Array, bias: Array) -> float:
        """Mean square error of q [m, n] and bias [m] as a share of the outputs' variance; 1 is what the mean scores."""
        spread = self.var_y.sum() - 2.0 * np.sum(q.T * self.xy) + np.sum(q.T * (self.xx @ q.T))
        shift = self.mean_y - q @ self.mean_x - bias
        return float((spread + np.sum(shift**2)) / self.var_y.sum())


@dataclass(frozen=True)
class Solution:
    """One solved layer, in the layer's own units: y ~ q x + bias."""

    w: Array  # [n]     on the simplex, zero off the support
    q: Array  # [m, n]  zero off the support
    bias: Array  # [m]
    support: Indices  # [k]     ascending
    history: tuple[float, ...]  # objective after each iteration, never rising
    converged: bool  # the last relative decrease was below the tolerance
    unexplained: float  # share of the outputs' variance left unexplained on the calibration positions


def solve_positive(matrix: Array, right: Array) -> Array:
    """matrix^-1 right for a symmetric positive definite matrix [n, n] and right [n, m], by Cholesky.

    In torch, whose threads `torch.set_num_threads` bounds: SciPy's own pool, on a two-core machine that others shared,
    took 25 times the processor time of one thread (n = 512).

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    if failed.item():
        raise np.linalg.LinAlgError(f"the leading minor of order {failed.item()} is not positive definite")
    return np.asarray(torch.cholesky_solve(torch.from_numpy(right), factor).numpy())


@dataclass(frozen=True)
class Problem:
    """The standardised regression: correlations r [n, n] of inputs, g [n, m] of inputs with outputs."""

    r: Array
    g: Array
    eps_w: float
    eps_l2: float
    sign: int

    def ridge(self, w: Array) -> tuple[Array, float]:
        """B = Q^T [n, m] that is best for fixed w [n], and the objective there.

        Solved in Lambda = Q / w, where the matrix D r D + (eps_l2 / n) I stays well conditioned as w goes to zero.
        The normal equations give data term + L2 term = 1 - <B, g> / m.
        """
        n, m = self.g.shape
        b = np.zeros_like(self.g)
        active = np.flatnonzero(w)
        w_a = w[active]
        matrix = self.r[np.ix_(active, active)] * np.outer(w_a, w_a)
        matrix[np.diag_indices_from(matrix)] += self.eps_l2 / n
        g_a = self.g[active]
        b[active] = w_a[:, None] * solve_positive(matrix, w_a[:, None] * g_a)
        objective = 1.0 - float(np.sum(b[active] * g_a)) / m
        return b, objective + self.sign * self.eps_w * float(np.sum(w_a * np.log(w_a)))

    def weights(self, b: Array, w: Array) -> Array:
        """w [n] that lowers the objective for fixed B [n, m], starting from w; channels with B_i = 0 get zero.

        When all of B is zero (outputs that no channel correlates with), w stays.
        """
        n, m = self.g.shape
        cost = self.eps_l2 / (n * m) * np.sum(b**2, axis=1)
        active = np.flatnonzero(cost)
        if len(active) == 0:
            return w
        out = np.zeros(n)
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
    n = len(cost)
    if sign > 0:
        # Stationary: -2 cost / w^3 + eps_w (log w + t) = 0, t = 1 + multiplier / eps_w.
        log_k = np.log(6.0 * cost / eps_w)

        def at(t: float) -> Array:
            return np.asarray(np.exp(-t + wrightomega(3.0 * t + log_k) / 3.0))

        low = float(np.max(2.0 * cost / eps_w))
        high = float(np.max(2.0 * cost * n**3 / eps_w)) + np.log(n)
    else:
        # Stationary: -2 cost / w^3 + slope + t = 0, slopes shifted so that the smallest is 0 and t > 0.
        slope = -eps_w * np.log(w)
        slope -= slope.min()

        def at(t: float) -> Array:
            return np.asarray(np.cbrt(2.0 * cost / (slope + t)))

        low = float(np.max(2.0 * cost - slope))
        high = float(np.max(2.0 * cost * n**3 - slope))
    # At `low` one weight is 1, at `high` none exceeds 1 / n, and every weight falls as t grows.
    while low < (middle := 0.5 * (low + high)) < high:
        low, high = (middle, high) if at(middle).sum() > 1.0 else (low, middle)
    found = at(high)
    return np.asarray(found / found.sum())


@dataclass(frozen=True)
class _Descent:
    """Where one start ended: w [n], B [n, m], the objective after each iteration."""

    w: Array
    b: Array
    history: list[float]
    converged: bool


def _descend(problem: Problem, w: Array, max_iterations: int, tolerance: float) -> _Descent:
    """Alternate from w [n] until the objective settles."""
    b, objective = problem.ridge(w)
    history = [objective]
    for _ in range(max_iterations):
        candidate = problem.weights(b, w)
        trimmed = np.where(candidate > SUPPORT_FLOOR * candidate.max(), candidate, 0.0)
        trimmed /= trimmed.sum()
        b_next, objective = problem.ridge(trimmed)
        if objective > history[-1] and np.any(trimmed != candidate):
            trimmed = candidate  # the cut channels still carried something: keep them another round
            b_next, objective = problem.ridge(candidate)
        if objective > history[-1]:
            return _Descent(w, b, history, converged=True)  # neither step can rise but by rounding
        w, b = trimmed, b_next
        history.append(objective)
        if history[-2] - objective <= tolerance * abs(objective):
            return _Descent(w, b, history, converged=True)
    return _Descent(w, b, history, converged=False)


def solve(
    gram: Gram,
    name: str,
    *,
    eps_w: float,
    eps_l2: float,
    sign: int,
    max_iterations: int,
    tolerance: float,
    warm_start: Array | None = None,
) -> Solution:
    """Minimise over Lambda [m, n] and w [n] on the simplex, X and Y standardised as the module says:

        1 / (T m) ||Y - Lambda D(w) X||^2 + sign * eps_w * sum_i w_i log w_i + eps_l2 / (n m) ||Lambda||^2

    Descends from uniform weights, from each channel's largest absolute covariance with an output, and from
    `warm_start` [n] when given; the lowest objective wins. The problem is not convex: the result is a local minimum.
    `name` is the layer, for messages.

    Raises:
        LodesetError: moments that cannot be used (see `Gram.moments`), a layer whose inputs or outputs are constant, or
            an eps_l2 too small for units that depend on one another.
    """
    moments = gram.moments(name)
    n = len(moments.mean_x)
    varying = np.flatnonzero(moments.varying)
    level_y = gram.yy.mean() / gram.count  # mean square of the outputs, the offset included
    scale_y = float(np.sqrt(moments.var_y.mean()))
    if len(varying) == 0 or scale_y**2 <= CONSTANT_RATIO * level_y:
        raise LodesetError(
            f"{name}: {len(varying)} of {n} units vary and the outputs' standard deviation is {scale_y:.2g} over "
            f"{gram.count} positions: calibrate on images that differ, or leave this layer out"
        )
    scale_x = np.sqrt(np.diag(moments.xx)[varying])
    problem = Problem(
        r=moments.xx[np.ix_(varying, varying)] / np.outer(scale_x, scale_x),
        g=moments.xy[varying] / (scale_x[:, None] * scale_y),
        eps_w=eps_w,
        eps_l2=eps_l2,
        sign=sign,
    )
    starts = [np.ones(len(varying)), np.max(np.abs(problem.g), axis=1)]
    if warm_start is not None:
        starts.append(warm_start[varying])
    try:
        descents = [
            _descend(problem, start / start.sum(), max_iterations, tolerance) for start in starts if start.sum() > 0.0
        ]
    except np.linalg.LinAlgError as error:
        raise LodesetError(
            f"{name}: units that repeat one another leave the regression singular at eps_L2 = {eps_l2:.2g}: "
            "raise l2_ratio"
        ) from error
    best = min(descents, key=lambda descent: descent.history[-1])
    w, q = np.zeros(n), np.zeros((len(moments.mean_y), n))
    w[varying] = best.w
    q[:, varying] = (best.b * (scale_y / scale_x[:, None])).T
    bias = moments.mean_y - q @ moments.mean_x
    return Solution(
        w=w,
        q=q,
        bias=bias,
        support=np.flatnonzero(w).astype(np.int64),
        history=tuple(best.history),
        converged=best.converged,
        unexplained=moments.unexplained(q, bias),
    )


def path(gram: Gram, name: str, job: PruneJob) -> dict[float, Solution]:
    """Solutions of one layer by eps_w, weakest penalty first, each started from the one before as well.

    eps_L2 is `job.l2_ratio * eps_w`: the sweep scales the whole penalty and keeps its shape.
    """
    solutions: dict[float, Solution] = {}
    warm_start: Array | None = None
    for eps_w in sorted(job.sweep):
        solutions[eps_w] = solve(
            gram,
            name,
            eps_w=eps_w,
            eps_l2=job.l2_ratio * eps_w,
            sign=job.entropy_sign,
            max_iterations=job.max_iterations,
            tolerance=job.tolerance,
            warm_start=warm_start,
        )
        warm_start = solutions[eps_w].w
    return solutions
