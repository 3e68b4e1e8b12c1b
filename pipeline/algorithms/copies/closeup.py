"""Decide from full images whether two images are copies of one picture. P pairs, S side.

Key points locate one image in the other (`keypoints`). The part that both show is drawn from each at 64x64 pixels,
aligned to a fraction of a pixel, and measured. In addition to the agreement, the remaining displacement of its parts is
measured: two photographs of one scene agree almost as well as copies do, but no map moves the one onto the other
everywhere.

Small networks weigh the measures. They are fitted on generated copies (`algorithms.copies.variations`,
`benchmarks/fit_closeups.py`) and ship with the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.copies import shipped
from lodeset.pipeline.algorithms.copies.alignment import align, warped
from lodeset.pipeline.algorithms.copies.comparison import agreeing, correlation, detail, shape, standardised, tiles
from lodeset.pipeline.algorithms.copies.keypoints import Alignment, Described, mirrored
from lodeset.pipeline.algorithms.copies.scorer import arrays_of, scorer_of

Tensor = torch.Tensor
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]

SIDE = 64
# Shorter side from which an image contains more than its thumbnail of 32 pixels.
LEAST_SIDE = 64
# Log-odds of thumbnails above which a pair is examined in a close-up, and log-odds of the close-up below which those of
# the thumbnails are ignored. Below -4 thumbnails miss .004 of altered copies of photographs; see
# benchmarks/copies_2core-cpu_202611.md.
WORTH, DOUBT = -4.0, -1.0
SMALLEST = 16.0  # minimum area of an overlap, in square pixels of a working image
COARSE_STEPS, FINE_STEPS = 4, 5
SMOOTHED, TILES, TEXTURED, AGREES = 9, 8, 3.0, 0.7
# Displacements are measured in windows of this many pixels, at the same distance from each other; a window with too
# little texture gets a low weight.
WINDOW, APART, TEXTURE, LONGEST = 12, 4, 0.02, 3.0
FEATURES = (
    "correlation",
    "robust_correlation",
    "agreeing_pixels",  # share of the overlap
    "detail_correlation",
    "robust_detail_correlation",
    "agreeing_tiles",  # share of the textured ones
    "textured_tiles",
    "tiles_correlation",
    "displacement",  # pixels, mean over what has texture
    "displaced",  # share that is displaced by more than half a pixel
    "largest_displacement",  # 90 % quantile
    "points",  # log of the number that agree on the map
    "agreeing_points",  # share of the matches
    "overlap_first",  # share of the image
    "overlap_second",
    "log_scale",
    "log_stretch",
    "log_resolution",  # pixels of the coarser original per drawn pixel
)


@dataclass(frozen=True)
class Overlap:
    """The part that both images show, drawn from each."""

    first: Bytes  # [S, S]
    second: Bytes
    inside: Bytes  # 255 where the first image has pixels
    facts: tuple[float, ...]  # the features from `points` on


def score(features: Floats) -> Floats:
    """Log-odds [P] that pairs with these features [P, F] are copies."""
    return scorer_of(arrays_of(shipped.CLOSEUP)).score(features)


def overlap(first: Described, second: Described, found: Alignment) -> Overlap | None:
    """Draw the part that both images show; None if it is next to nothing."""
    seen = mirrored(second).grey if found.mirrored else second.grey
    corners = cv2.transform(_corners(first.grey)[None], cv2.invertAffineTransform(found.map))[0]
    common = _clipped(corners, seen.shape[1], seen.shape[0])
    area = _area(common)
    enlarged = abs(float(np.linalg.det(found.map[:, :2])))
    if area < SMALLEST or area * enlarged < SMALLEST:
        return None
    (left, top), (right, bottom) = common.min(axis=0), common.max(axis=0)
    cell = np.array([[(right - left) / SIDE, 0, left], [0, (bottom - top) / SIDE, top]], np.float64)
    into_first = found.map @ np.vstack([cell, [0, 0, 1]])
    _, log_stretch, _ = shape(torch.from_numpy(found.map)[None])
    # Number of original pixels per drawn pixel.
    native = _scale(cell) / second.scale, _scale(into_first) / first.scale
    facts = (
        float(np.log(found.inliers)),
        found.inliers / found.matches,
        float(area) * enlarged / first.grey.size,
        float(area) / seen.size,
        abs(float(np.log(enlarged))),
        float(log_stretch[0]),
        float(np.log(min(native))),
    )
    drawn = (
        _drawn(first.grey, into_first),
        _drawn(seen, cell),
        _drawn(np.full_like(first.grey, 255), into_first, outside=0),
    )
    return Overlap(*drawn, facts)


def measured(overlaps: list[Overlap]) -> Floats:
    """Features [P, F]."""
    if not overlaps:
        return np.zeros((0, len(FEATURES)), np.float32)
    if len(overlaps) == 1:  # products of a single row are rounded differently from those of several rows
        return measured(overlaps * 2)[:1]
    image, target, inside = (
        torch.from_numpy(np.stack(drawn).astype(np.float32))
        for drawn in zip(*((pair.first, pair.second, pair.inside) for pair in overlaps), strict=True)
    )
    maps = torch.eye(3)[:2].repeat(len(overlaps), 1, 1)
    maps = align(functional.avg_pool2d(image, 2), functional.avg_pool2d(target, 2), maps, COARSE_STEPS)
    maps = align(image, target, maps, FINE_STEPS)
    seen, within = warped(image, maps)
    common = within * (warped(inside / 255, maps)[0] > 0.99)
    facts = torch.tensor([pair.facts for pair in overlaps])
    return np.asarray(torch.cat([_agreement(seen, target.flatten(1), common), facts], dim=1).numpy(), np.float32)


def between(first: Described, second: Described, found: Alignment) -> Floats:
    """The map [2, 3] of coordinates from -1 to 1, in the form of `edges`, from the second image to the first."""
    unit = np.vstack([found.map, [0, 0, 1]])
    whole = np.linalg.inv(_unit(first.grey)) @ unit @ _unit(second.grey)
    if found.mirrored:
        whole = whole @ np.diag([-1.0, 1, 1])
    return np.asarray(whole[:2], np.float32)


def _unit(grey: Bytes) -> Doubles:
    """Map coordinates of -1 to 1 to pixels."""
    height, width = grey.shape
    return np.array([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])


def _corners(grey: Bytes) -> Doubles:
    height, width = grey.shape
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)


def _clipped(corners: Doubles, width: float, height: float) -> Doubles:
    """The part of a convex polygon [M, 2] within 0..width, 0..height (Sutherland and Hodgman, CACM 1974).

    OpenCV's `intersectConvexConvex` is wrong by half if sides nearly coincide.
    """
    for axis, sign, limit in ((0, 1, 0.0), (0, -1, -width), (1, 1, 0.0), (1, -1, -height)):
        kept: list[Doubles] = []
        for here, after in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            start, stop = sign * here[axis] - limit, sign * after[axis] - limit
            if start >= 0:
                kept.append(here)
            if (start >= 0) != (stop >= 0):
                kept.append(here + (after - here) * (start / (start - stop)))
        corners = np.array(kept).reshape(-1, 2)
    return corners


def _area(corners: Doubles) -> float:
    x, y = corners.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _scale(linear: Doubles) -> float:
    """Length of a step in the longer direction."""
    return float(max(np.linalg.norm(linear[:, 0]), np.linalg.norm(linear[:, 1])))


def _drawn(grey: Bytes, cell: Doubles, outside: int | None = None) -> Bytes:
    """S x S pixels sampled through the map [2, 3] from drawn pixels to an image's; each is the mean of what it
    covers.
    """
    fine = max(1, int(np.ceil(_scale(cell))))
    step = cell[:, :2] / fine
    # OpenCV counts from the center of the first pixel.
    offset = cell[:, 2] + step @ [0.5, 0.5] - 0.5
    pixels = cv2.warpAffine(
        grey,
        np.column_stack([step, offset]),
        (SIDE * fine, SIDE * fine),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE if outside is None else cv2.BORDER_CONSTANT,
        borderValue=outside or 0,
    )
    return np.asarray(cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)


def _agreement(seen: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """The features before `points` [P, 11] of aligned drawings [P, S*S]."""
    weights = agreeing(seen, target, inside)
    detail_seen, detail_target = detail(seen, SMOOTHED), detail(target, SMOOTHED)
    of_tiles, contrast = correlation(tiles(seen, TILES), tiles(target, TILES), tiles(inside, TILES) + 1e-3)
    of_tiles, contrast = of_tiles.reshape(len(target), -1), contrast.reshape(len(target), -1)
    covered = (tiles(inside, TILES).mean(dim=1) > 0.5).reshape(len(target), -1).float()
    textured = (contrast > TEXTURED).float() * covered
    weighted = contrast * covered
    return torch.stack(
        [
            correlation(seen, target, inside)[0],
            correlation(seen, target, weights)[0],
            (weights > 0.5).float().sum(dim=1) / inside.sum(dim=1).clamp_min(1),
            correlation(detail_seen, detail_target, inside)[0],
            correlation(detail_seen, detail_target, weights)[0],
            ((of_tiles > AGREES) * textured).sum(dim=1) / textured.sum(dim=1).clamp_min(1),
            textured.mean(dim=1),
            (of_tiles * weighted).sum(dim=1) / weighted.sum(dim=1).clamp_min(1e-3),
            *_displacement(seen, target, inside),
        ],
        dim=1,
    )


def _displacement(seen: Tensor, target: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The displacement of windows of aligned drawings in pixels: its mean, the share above half a pixel, and its 90 %
    quantile.

    One step of Lucas and Kanade (IJCAI 1981) in each window, on standardized pixels minus their local mean.
    """
    first, second = (
        detail(standardised(pixels, inside + 1e-6)[0], WINDOW + 1).reshape(-1, 1, SIDE, SIDE)
        for pixels in (seen, target)
    )
    middle, counts = (first + second) / 2, inside.reshape(-1, 1, SIDE, SIDE).clone()
    across, along = torch.zeros_like(first), torch.zeros_like(first)
    across[..., 1:-1] = (middle[..., 2:] - middle[..., :-2]) / 2
    along[..., 1:-1, :] = (middle[..., 2:, :] - middle[..., :-2, :]) / 2
    for rim in (slice(None, 2), slice(-2, None)):
        counts[..., rim, :] = 0
        counts[..., rim] = 0

    def mean(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values * counts, WINDOW, APART).flatten(1)

    xx, xy, yy = mean(across * across), mean(across * along), mean(along * along)
    x, y = mean(across * (first - second)), mean(along * (first - second))
    half = (xx + yy) / 2
    determinant = xx * yy - xy * xy + 1e-4 * half * half + 1e-8
    length = torch.hypot((yy * x - xy * y) / determinant, (xx * y - xy * x) / determinant).clamp(max=LONGEST)
    # The smaller eigenvalue: how well both directions are determined.
    certainty = (half - torch.hypot((xx - yy) / 2, xy)).clamp_min(0)
    certainty = certainty / (certainty + TEXTURE)
    total = certainty.sum(dim=1).clamp_min(0.1)
    ordered = (length * (certainty > 0.5)).sort(dim=1, descending=True).values
    return (
        (length * certainty).sum(dim=1) / total,
        ((length > 0.5) * certainty).sum(dim=1) / total,
        ordered[:, ordered.shape[1] // 10],
    )
