"""Locate one image in another by local features: SIFT key points (Lowe, IJCV 2004), matched and fitted with RANSAC.

Thumbnails cannot be aligned with a strong crop, a picture inside another one, or a rotation by any angle; key points
can. M points. Coordinates are pixels of the working image, with the center of the first pixel at (.5, .5).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

# Sides of the working image: large images are reduced until the longer side fits, small ones enlarged toward the
# shorter one, because SIFT finds nothing within 8 pixels of the border and little that is smaller than 4. Of altered
# copies of 64-pixel (32-pixel) photographs .96 (.92) find 8 points of their original this way; of pairs of different
# photographs .000 (.002) do.
SHORTEST, LONGEST = 96, 256
POINTS = 400
CONTRAST = 0.02  # half of Lowe's: copies are often flat, blurred or dark
CELLS, DIRECTIONS = 4, 8  # of a descriptor: 4 x 4 histograms of 8 directions
# A match counts if its second best is farther by this factor, and if it is the best from both sides.
RATIO = 0.8
REACH = 3.0  # maximum distance, in pixels, of a point that agrees with the map
LEAST = 5  # minimum number of agreeing points: different pictures reach smaller numbers as well
TRIALS, CONFIDENCE, REFINEMENTS = 2_000, 0.999, 10
SMALLEST, LARGEST, STRETCHED = (
    0.05,
    20.0,
    3.0,
)  # limits on the scale of a map, and on the ratio between its two directions


@dataclass(frozen=True)
class Described:
    """An image described by its key points."""

    grey: Bytes  # [H, W]
    scale: float  # pixels of the working image per pixel of the original
    places: Floats  # [M, 2]: x, y
    descriptors: Floats  # [M, 128], L2-normalized square roots of SIFT (Arandjelovic and Zisserman, CVPR 2012)


@dataclass(frozen=True)
class Alignment:
    """The affine map [2, 3] from the second image's pixels (mirrored first if `mirrored`) to the first's.

    `agreeing`: [inliers, 2], the rows of the key points that agree on it, in the first image and in the second.
    """

    map: Doubles
    mirrored: bool
    inliers: int
    matches: int
    agreeing: Ints


def described(image: Image.Image) -> Described:
    """The key points of an RGB image; the same ones for the same pixels."""
    scale = min(1.0, LONGEST / max(image.size))
    if min(image.size) * scale < SHORTEST:
        scale = min(SHORTEST / min(image.size), LONGEST / max(image.size))
    grey = image.convert("L")
    if scale != 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        grey = grey.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX)
    pixels = np.asarray(grey)
    # Without precise upscaling every point is off by a quarter of a pixel.
    sift = cv2.SIFT_create(nfeatures=POINTS, contrastThreshold=CONTRAST, enable_precise_upscale=True)  # type: ignore[attr-defined]
    points, descriptors = sift.detectAndCompute(pixels, None)
    if descriptors is None:
        return Described(pixels, scale, np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32))
    rows = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-6))
    return Described(pixels, scale, np.array([p.pt for p in points], np.float32) + 0.5, rows.astype(np.float32))


def mirrored(image: Described) -> Described:
    """The same image mirrored: its histograms are permuted, so that no key points have to be detected again."""
    places = image.places * np.array([-1, 1], np.float32) + np.array([image.grey.shape[1], 0], np.float32)
    cells = image.descriptors.reshape(-1, CELLS, CELLS, DIRECTIONS)[:, ::-1]
    turned = cells[..., -np.arange(DIRECTIONS) % DIRECTIONS].reshape(-1, CELLS * CELLS * DIRECTIONS)
    return Described(np.ascontiguousarray(image.grey[:, ::-1]), image.scale, places, np.ascontiguousarray(turned))


def aligned(first: Described, second: Described) -> Alignment | None:
    """Align the second image with the first, unchanged or mirrored, whichever has more agreeing points; None if there
    are too few.
    """
    fits = [_fitted(first, second, False), _fitted(first, mirrored(second), True)]
    return max((fit for fit in fits if fit), key=lambda fit: fit.inliers, default=None)


def _fitted(first: Described, second: Described, in_mirror: bool) -> Alignment | None:
    a, b = _matched(first.descriptors, second.descriptors)
    if len(a) < LEAST:
        return None
    # OpenCV seeds this with a constant: the same points give the same map.
    fitted_map, agree = cv2.estimateAffine2D(
        second.places[b],
        first.places[a],
        method=cv2.RANSAC,
        ransacReprojThreshold=REACH,
        maxIters=TRIALS,
        confidence=CONFIDENCE,
        refineIters=REFINEMENTS,
    )
    inliers = int(agree.sum()) if fitted_map is not None else 0
    if inliers < LEAST:
        return None
    largest, smallest = np.linalg.svd(fitted_map[:, :2], compute_uv=False)
    if smallest < SMALLEST or largest > LARGEST or largest > STRETCHED * smallest:
        return None
    agreeing = np.column_stack([a, b])[agree.ravel() > 0]
    return Alignment(np.asarray(fitted_map, np.float64), in_mirror, inliers, len(a), agreeing)


def _matched(first: Floats, second: Floats) -> tuple[Ints, Ints]:
    """Rows of descriptors [M, 128] that are mutually nearest, and clearly nearer than the second nearest."""
    if len(first) < 2 or len(second) < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    similarity = first @ second.T
    best, back, rows = similarity.argmax(axis=1), similarity.argmax(axis=0), np.arange(len(first))
    nearest = similarity[rows, best]
    similarity[rows, best] = -1
    # Squared distances between unit vectors.
    clear = 1 - nearest < RATIO**2 * (1 - similarity.max(axis=1))
    chosen = np.flatnonzero(clear & (back[best] == rows))
    return chosen, best[chosen]
