"""Robust affine alignment of many pairs of small images at once. P pairs, S side, S*S pixels.

Inverse compositional Gauss-Newton (Baker and Matthews, IJCV 2004) on standardized luminance, so that an image's gain
and bias do not matter; pixels that disagree (a stamp, a caption) lose their weight gradually (Geman-McClure).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as functional

from lodeset.pipeline.algorithms.copies.comparison import agreement_weights, standardised

Tensor = torch.Tensor

# Residual, in standard deviations of the image, at which a pixel has a weight of a quarter.
ROBUST = 0.8
DAMPING = 1e-3
LONGEST_STEP = 0.15  # as a share of half a side


@functools.lru_cache(maxsize=4)
def grid(side: int) -> Tensor:
    """Pixel centers in homogeneous coordinates, float32 [3, S*S]: x, y from -1 to 1, and 1."""
    centres = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x.reshape(-1), y.reshape(-1), torch.ones(side * side)])


def warped(images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Images [P, S, S] sampled through affine maps [P, 2, 3]: luminance [P, S*S], and 1.0 for positions inside the
    image.
    """
    count, side = len(images), images.shape[-1]
    places = maps @ grid(side)
    seen = functional.grid_sample(
        images[:, None],
        places.transpose(1, 2).reshape(count, side, side, 2),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return seen.reshape(count, -1), (places.abs() <= 1).all(dim=1).float()


def align(images: Tensor, targets: Tensor, maps: Tensor, steps: int) -> Tensor:
    """Improve maps [P, 2, 3] from the coordinates of targets [P, S, S] to those of images [P, S, S], starting from
    `maps`.
    """
    side = targets.shape[-1]
    target = targets.reshape(len(targets), -1)
    x, y, _ = grid(side)
    across, along = _slopes(targets)
    columns = torch.stack([across * x, across * y, across, along * x, along * y, along], dim=1)
    weights = torch.ones_like(target)
    for _ in range(steps):
        seen, inside = warped(images, maps)
        counted = weights * inside + 1e-6
        wanted, deviation = standardised(target, counted)
        residuals = standardised(seen, counted)[0] - wanted
        weights = agreement_weights(residuals, ROBUST)
        jacobian = columns / deviation[:, None]
        weighted = jacobian * (weights * inside + 1e-6)[:, None]
        normal = weighted @ jacobian.transpose(1, 2)
        trace = normal.diagonal(dim1=1, dim2=2).mean(dim=1)
        normal = normal + torch.eye(6) * (DAMPING * trace + 1e-3)[:, None, None]
        step = torch.linalg.solve(normal, weighted @ residuals[:, :, None])[:, :, 0]
        maps = _composed(maps, step.clamp(-LONGEST_STEP, LONGEST_STEP))
    return maps


def _slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences [P, S*S] along x and y, in luminance per unit of the coordinates; 0 at the border."""
    scale = images.shape[-1] / 4
    across, along = torch.zeros_like(images), torch.zeros_like(images)
    across[:, :, 1:-1] = (images[:, :, 2:] - images[:, :, :-2]) * scale
    along[:, 1:-1] = (images[:, 2:] - images[:, :-2]) * scale
    return across.reshape(len(images), -1), along.reshape(len(images), -1)


def _composed(maps: Tensor, step: Tensor) -> Tensor:
    """The map after undoing the step that would have moved the target onto the image."""
    moved = torch.eye(3).repeat(len(maps), 1, 1)
    moved[:, :2] += step.reshape(-1, 2, 3)
    undone: Tensor = torch.linalg.inv(moved)
    return maps @ undone
