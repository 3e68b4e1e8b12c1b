"""Measures of two aligned images that were drawn on the same grid. P pairs, S side, S*S pixels (one row per image)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional

Tensor = torch.Tensor

FLAT = 2.0  # smaller luminance deviations are not amplified further
# Residual, in standard deviations, at which a pixel of aligned images has a weight of a quarter.
ROBUST = 0.5


def standardised(pixels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [P, S*S] with weighted mean 0 and deviation 1, and that deviation [P, 1]."""
    total = weights.sum(dim=1, keepdim=True).clamp_min(1e-3)
    centred = pixels - (pixels * weights).sum(dim=1, keepdim=True) / total
    deviation = ((centred * centred * weights).sum(dim=1, keepdim=True) / total).sqrt().clamp_min(FLAT)
    return centred / deviation, deviation


def agreement_weights(residuals: Tensor, scale: float) -> Tensor:
    """The weight of each pixel: 1 where two standardized images agree, toward 0 where they do not (Geman-McClure)."""
    return 1 / (1 + (residuals / scale) ** 2) ** 2


def agreeing(first: Tensor, second: Tensor, inside: Tensor) -> Tensor:
    """Weights [P, S*S] of the content that two images share: a stamp or a covered corner gets little weight."""
    weights = inside
    for _ in range(4):
        counted = weights + 1e-6
        residuals = standardised(first, counted)[0] - standardised(second, counted)[0]
        weights = inside * agreement_weights(residuals, ROBUST)
    return weights


def correlation(left: Tensor, right: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted correlation [P] of pixels [P, M], and the smaller of their deviations [P]."""
    total = weights.sum(dim=1, keepdim=True).clamp_min(1e-3)
    left = left - (left * weights).sum(dim=1, keepdim=True) / total
    right = right - (right * weights).sum(dim=1, keepdim=True) / total
    first, second = (left * left * weights).sum(dim=1), (right * right * weights).sum(dim=1)
    correlated = (left * right * weights).sum(dim=1) / (first * second).sqrt().clamp_min(1e-3)
    return correlated, (torch.minimum(first, second) / total[:, 0]).sqrt()


def detail(pixels: Tensor, size: int) -> Tensor:
    """The images [P, S*S] minus their means over size x size pixels (odd)."""
    side, reach = math.isqrt(pixels.shape[1]), size // 2
    images = pixels.reshape(-1, 1, side, side)
    smooth = functional.avg_pool2d(functional.pad(images, (reach,) * 4, mode="replicate"), size, 1)
    return (images - smooth).reshape(len(pixels), -1)


def tiles(pixels: Tensor, along: int) -> Tensor:
    """Images [P, S*S] as their tiles, `along` each side: [P*along*along, (S/along)^2]."""
    size = math.isqrt(pixels.shape[1]) // along
    return pixels.reshape(-1, along, size, along, size).transpose(2, 3).reshape(-1, size * size)


def shape(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much maps [P, 2, 3] scale the area (log), stretch one direction relative to the other (log), and deviate from
    quarter turns.
    """
    linear = maps[:, :, :2]
    determinant = linear[:, 0, 0] * linear[:, 1, 1] - linear[:, 0, 1] * linear[:, 1, 0]
    length = linear.square().sum(dim=(1, 2))  # of the singular values s, t: s*s + t*t, while |determinant| = s*t
    area = determinant.abs().clamp_min(1e-3)
    ratio = (length / area / 2).clamp_min(1)
    stretch = torch.log(ratio + (ratio * ratio - 1).clamp_min(0).sqrt())
    side = torch.where(determinant < 0, -1.0, 1.0)
    angle = torch.atan2(linear[:, 1, 0] - side * linear[:, 0, 1], side * linear[:, 1, 1] + linear[:, 0, 0])
    quarter = torch.pi / 2
    return area.log().abs(), stretch, (torch.remainder(angle + quarter / 2, quarter) - quarter / 2).abs()
