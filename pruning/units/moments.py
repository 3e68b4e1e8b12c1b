"""Second moments of a layer's inputs and outputs: all that choosing units and rewriting weights needs from the images.

Moments add up over images and workers, and every strength of a penalty is solved without reading the images again.

Shapes: T positions, n inputs of the layer (for a convolution: the values under its kernel), m outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lodeset.pipeline.errors import LodesetError

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# float32 activations that are constant up to rounding have var / E[x^2] near 1e-14.
CONSTANT_RATIO = 1e-12


@dataclass(frozen=True)
class Gram:
    """Sums over T positions of a layer's inputs x and outputs y, in float64; `+` joins disjoint sets of positions.

    A layer with n = 1536 and m = 384 takes 24 MB, one with n = 4096 and m = 1024 takes 168 MB.
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

    def outputs(self, which: slice) -> "Gram":
        """The sums for some of the outputs."""
        return replace(self, xy=self.xy[:, which], yy=self.yy[which], sum_y=self.sum_y[which])

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All sums by name, for `numpy.savez` or safetensors."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Gram":
        """The inverse of `arrays`."""
        sums = {f.name: np.asarray(arrays[f.name], dtype=np.float64) for f in fields(cls) if f.name != "count"}
        return cls(**sums, count=int(arrays["count"]))

    def moments(self, name: str) -> "Moments":
        """Covariances over the measured positions.

        Raises:
            LodesetError: the sums are not finite, or there are too few positions for n weights and a bias per output.
        """
        n = len(self.sum_x)
        if not all(np.isfinite(a).all() for a in (self.xx, self.xy, self.yy, self.sum_x, self.sum_y)):
            raise LodesetError(
                f"{name}: the calibration activations contain infinities or NaN: "
                "check the checkpoint, or calibrate in float32"
            )
        if self.count <= n + 1:
            raise LodesetError(
                f"{name}: {self.count} calibration positions cannot determine {n} weights and a bias per output: "
                f"use more than {n + 1} (raise calibration_images or positions_per_image)"
            )
        mean_x, mean_y = self.sum_x / self.count, self.sum_y / self.count
        return Moments(
            count=self.count,
            xx=self.xx / self.count - np.outer(mean_x, mean_x),
            xy=self.xy / self.count - np.outer(mean_x, mean_y),
            var_y=np.maximum(self.yy / self.count - mean_y**2, 0.0),
            mean_x=mean_x,
            mean_y=mean_y,
            varying=np.diag(self.xx) / self.count - mean_x**2 > CONSTANT_RATIO * np.diag(self.xx) / self.count,
        )


@dataclass(frozen=True)
class Moments:
    """Covariances of a layer's inputs and outputs over `count` positions, and which inputs vary at all."""

    count: int
    xx: Array  # [n, n]
    xy: Array  # [n, m]
    var_y: Array  # [m]
    mean_x: Array  # [n]
    mean_y: Array  # [m]
    varying: npt.NDArray[np.bool_]  # [n]

    def unexplained(self, q: Array, bias: Array) -> float:
        """Mean square error of q [m, n] and bias [m] as a share of the outputs' variance; predicting the mean scores
        1.
        """
        used = np.flatnonzero(q.any(axis=0))  # zero columns contribute nothing, and are most of a pruned layer
        b = q[:, used].T
        spread = self.var_y.sum() - 2.0 * np.sum(b * self.xy[used]) + np.sum(b * (self.xx[np.ix_(used, used)] @ b))
        shift = self.mean_y - q @ self.mean_x - bias
        return float((spread + np.sum(shift**2)) / self.var_y.sum())


def solve_positive(matrix: Array, right: Array) -> Array:
    """matrix^-1 right for a symmetric positive definite matrix [n, n] and right [n, m], by Cholesky.

    Uses torch, whose threads `torch.set_num_threads` limits: SciPy's own thread pool, on a shared two-core machine,
    took 25 times the processor time of one thread (n = 512).

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    if failed.item():
        raise np.linalg.LinAlgError(f"the leading minor of order {failed.item()} is not positive definite")
    return np.asarray(torch.cholesky_solve(torch.from_numpy(right), factor).numpy())
