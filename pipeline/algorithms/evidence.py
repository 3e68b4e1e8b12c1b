"""Are two aligned thumbnails copies of one picture? Measured agreement, and small networks that weigh it. P pairs, S side.

The networks are fitted on copies that are made for them (`algorithms.variations`, `benchmarks/fit_copies.py`), never on labels
of a pool, and ship with the package beside the whitening of the descriptors: what a pair is worth depends on its two images and
on how similar others of the pool are to them.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray

from pipeline.algorithms import views
from pipeline.algorithms.alignment import agreement_weights, align, standardised, warped
from pipeline.algorithms.images import THUMBNAIL_SIDE

Tensor = torch.Tensor
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

MODEL = Path(__file__).with_name("copies.npz")
COARSE_STEPS, FINE_STEPS = 6, 5
PAIRS_AT_ONCE = 256  # what they take stays in the cache: 6x faster than 2,048
# Residual, in standard deviations, at which a pixel of aligned images counts a quarter.
ROBUST = 0.5
TILES = 4  # along each side
TEXTURED = 4.0  # luminance deviation of a tile that can agree or disagree
# A pair is taken when it stands this far above what its images find elsewhere, or where they find little: ten pictures that
# look as much alike are a kind of picture (hands before one wall, digits, one car model), not copies of one. Measured with
# copies made of 15,866 images of 8 domains, and on the pairs known among these: see docs/decisions/0013.
STANDS_CLEAR = 0.25
SPARSE = 0.6
# Log-odds below which a pair is no edge at all.
FLOOR = 0.0
CANDIDATE_FEATURES = 2  # the last ones, which depend on the pool
FEATURES = (
    "correlation",
    "robust_correlation",
    "agreeing_pixels",  # share of the overlap
    "overlap",
    "detail_correlation",
    "robust_detail_correlation",
    "worst_tile",
    "quarter_tile",  # a quarter of the tiles agree less
    "half_tile",
    "best_quarter_tile",
    "textured_tiles_correlation",
    "agreeing_tiles",
    "textured_tiles",
    "whitened_similarity",
    "log_scale",
    "log_stretch",
    "turn",  # from the nearest quarter turn, radians
    "candidate_similarity",
    "stands_out",
)


@dataclass(frozen=True)
class Model:
    """What ships: the whitening [C*C, D], and E networks with two hidden layers of H units."""

    whitening: Floats
    mean: Floats  # [F]
    deviation: Floats  # [F]
    hidden: Floats  # [E, H, F + 1], the last column is the bias
    deeper: Floats  # [E, H, H + 1]
    output: Floats  # [E, 1, H + 1]

    def score(self, features: Floats) -> Floats:
        """Log-odds [P] that pairs with these features [P, F] are copies: the mean of the networks."""
        scaled = torch.from_numpy(((features - self.mean) / self.deviation).clip(-4, 4).astype(np.float32))
        total = torch.zeros(len(features))
        for hidden, deeper, output in zip(self.hidden, self.deeper, self.output, strict=True):
            units = functional.silu(_layer(scaled, hidden))
            total += _layer(functional.silu(_layer(units, deeper)), output)[:, 0]
        return np.asarray((total / len(self.hidden)).numpy())


def _layer(inputs: Tensor, weights: Floats) -> Tensor:
    matrix = torch.from_numpy(weights)
    return inputs @ matrix[:, :-1].T + matrix[:, -1]


@functools.lru_cache(maxsize=1)
def identity() -> str:
    """What ships, for keys and fingerprints: SHA-256 of the file."""
    return hashlib.sha256(MODEL.read_bytes()).hexdigest()


@functools.lru_cache(maxsize=1)
def model() -> Model:
    with np.load(MODEL, allow_pickle=False) as file:
        return Model(**{name: file[name] for name in file.files})


def with_candidates(features: Floats, pairs: views.Candidates) -> Floats:
    """All features [P, F]: what was measured, and how the pairs were found."""
    return np.column_stack([features, pairs.similarity, pairs.stands_out]).astype(np.float32)


def measured(thumbnails: Bytes, a: Ints, b: Ints, starts: Floats, whitening: Floats) -> tuple[Floats, Floats]:
    """Aligns pairs of thumbnails [N, 1024] from where they start, maps [P, 2, 3].

    Returns all features but the last two, float32 [P, F - 2], and the maps [P, 2, 3] found.
    """
    features, maps = [np.zeros((0, len(FEATURES) - CANDIDATE_FEATURES), np.float32)], [np.zeros((0, 2, 3), np.float32)]
    for at in range(0, len(a), PAIRS_AT_ONCE):
        chosen = slice(at, at + PAIRS_AT_ONCE)
        image, target = _pixels(thumbnails, a[chosen]), _pixels(thumbnails, b[chosen])
        found = torch.from_numpy(starts[chosen])
        found = align(functional.avg_pool2d(image, 2), functional.avg_pool2d(target, 2), found, COARSE_STEPS)
        found = align(image, target, found, FINE_STEPS)
        features.append(_features(image, target, found, whitening).numpy())
        maps.append(found.numpy())
    return np.concatenate(features), np.concatenate(maps)


def _pixels(thumbnails: Bytes, rows: Ints) -> Tensor:
    return torch.from_numpy(thumbnails[rows].astype(np.float32)).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)


def _features(images: Tensor, targets: Tensor, maps: Tensor, whitening: Floats) -> Tensor:
    target = targets.reshape(len(targets), -1)
    seen, inside = warped(images, maps)
    weights = inside
    for _ in range(4):
        counted = weights + 1e-6
        residuals = standardised(seen, counted)[0] - standardised(target, counted)[0]
        weights = inside * agreement_weights(residuals, ROBUST)
    overlap = inside.sum(dim=1).clamp_min(1)
    detail_seen, detail_target = _detail(seen), _detail(target)
    tiles, contrast = _correlation(_tiles(seen), _tiles(target), _tiles(inside) + 1e-3)
    tiles, contrast = tiles.reshape(len(target), -1), contrast.reshape(len(target), -1)
    ordered = tiles.sort(dim=1).values
    textured = (contrast > TEXTURED).float()
    count = tiles.shape[1]
    return torch.stack(
        [
            _correlation(seen, target, inside)[0],
            _correlation(seen, target, weights)[0],
            (weights > 0.5).float().sum(dim=1) / overlap,
            inside.mean(dim=1),
            _correlation(detail_seen, detail_target, inside)[0],
            _correlation(detail_seen, detail_target, weights)[0],
            *(ordered[:, at] for at in (0, count // 4 - 1, count // 2 - 1, 3 * count // 4 - 1)),
            (tiles * contrast).sum(dim=1) / contrast.sum(dim=1).clamp_min(1e-3),
            ((tiles > 0.85) * textured).mean(dim=1),
            textured.mean(dim=1),
            _whitened_similarity(seen, target, whitening),
            *_shape(maps),
        ],
        dim=1,
    )


def _correlation(one: Tensor, other: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted correlation [P] of pixels [P, M], and the smaller of their deviations [P]."""
    total = weights.sum(dim=1, keepdim=True).clamp_min(1e-3)
    one = one - (one * weights).sum(dim=1, keepdim=True) / total
    other = other - (other * weights).sum(dim=1, keepdim=True) / total
    first, second = (one * one * weights).sum(dim=1), (other * other * weights).sum(dim=1)
    correlation = (one * other * weights).sum(dim=1) / (first * second).sqrt().clamp_min(1e-3)
    return correlation, (torch.minimum(first, second) / total[:, 0]).sqrt()


def _detail(pixels: Tensor) -> Tensor:
    """What a 5x5 mean leaves of the images [P, 1024]."""
    images = pixels.reshape(-1, 1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    smooth = functional.avg_pool2d(functional.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1)
    return (images - smooth).reshape(len(pixels), -1)


def _tiles(pixels: Tensor) -> Tensor:
    """Images [P, 1024] as their 4x4 tiles [P*16, 64]."""
    size = THUMBNAIL_SIDE // TILES
    return pixels.reshape(-1, TILES, size, TILES, size).transpose(2, 3).reshape(-1, size * size)


def _whitened_similarity(seen: Tensor, target: Tensor, whitening: Floats) -> Tensor:
    operator = torch.from_numpy(views.cells().T @ whitening)
    return functional.cosine_similarity(seen @ operator, target @ operator, dim=1)


def _shape(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By how much maps scale the area (log), stretch one direction against the other (log), and turn off the quarters."""
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
