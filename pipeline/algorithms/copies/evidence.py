"""Decide from aligned thumbnails whether two images are copies of one picture. P pairs, S side.

Small networks weigh the measured agreement. They are fitted on generated copies (`algorithms.copies.variations`,
`benchmarks/fit_copies.py`), never on labels of a pool, and ship with the package together with the whitening of the
descriptors: the score of a pair depends on its two images and on how similar others of the pool are to them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.copies import shipped, views
from lodeset.pipeline.algorithms.copies.alignment import align, warped
from lodeset.pipeline.algorithms.copies.comparison import agreeing, correlation, detail, shape, tiles
from lodeset.pipeline.algorithms.copies.scorer import Scorer, arrays_of, scorer_of
from lodeset.pipeline.algorithms.images.decoding import THUMBNAIL_SIDE

Tensor = torch.Tensor
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

COARSE_STEPS, FINE_STEPS = 6, 5
PAIRS_AT_ONCE = 256  # fits into the cache: 6x faster than 2,048
TILES = 4  # along each side
SMOOTHED = 5  # pixels, the size of a local mean
TEXTURED = 4.0  # minimum luminance deviation of a tile that can agree or disagree
# A pair is accepted if it stands this far above what its images find elsewhere, or if they find little. Ten pictures
# that look equally similar are a kind of picture (hands in front of one wall, digits, one car model), not copies of one
# picture. Measured with copies of 15,866 images of 8 domains, and on the known pairs among these: see
# docs/decisions/0013.
STANDS_CLEAR = 0.25
SPARSE = 0.6
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
MEASURED = len(FEATURES) - CANDIDATE_FEATURES  # the others


@dataclass(frozen=True)
class Model:
    """The shipped model: the whitening [C*C, D], and the networks."""

    whitening: Floats
    networks: Scorer

    def score(self, features: Floats) -> Floats:
        """Log-odds [P] that pairs with these features [P, F] are copies."""
        return self.networks.score(features)


@functools.lru_cache(maxsize=1)
def model() -> Model:
    arrays = arrays_of(shipped.EVIDENCE)
    return Model(arrays["whitening"], scorer_of(arrays))


def with_candidates(features: Floats, pairs: views.Candidates) -> Floats:
    """All features [P, F]: the measured ones, and how the pairs were found."""
    return np.column_stack([features, pairs.similarity, pairs.stands_out]).astype(np.float32)


def measured(thumbnails: Bytes, a: Ints, b: Ints, starts: Floats, whitening: Floats) -> tuple[Floats, Floats]:
    """Align pairs of thumbnails [N, 1024], starting from the maps `starts` [P, 2, 3].

    Returns all features except the last two, float32 [P, F - 2], and the resulting maps [P, 2, 3].
    """
    features, maps = [np.zeros((0, MEASURED), np.float32)], [np.zeros((0, 2, 3), np.float32)]
    for at in range(0, len(a), PAIRS_AT_ONCE):
        chosen = slice(at, at + PAIRS_AT_ONCE)
        image, target = _pixels(thumbnails, a[chosen]), _pixels(thumbnails, b[chosen])
        aligned_maps = torch.from_numpy(starts[chosen])
        aligned_maps = align(
            functional.avg_pool2d(image, 2), functional.avg_pool2d(target, 2), aligned_maps, COARSE_STEPS
        )
        aligned_maps = align(image, target, aligned_maps, FINE_STEPS)
        features.append(_features(image, target, aligned_maps, whitening).numpy())
        maps.append(aligned_maps.numpy())
    return np.concatenate(features), np.concatenate(maps)


def _pixels(thumbnails: Bytes, rows: Ints) -> Tensor:
    return torch.from_numpy(thumbnails[rows].astype(np.float32)).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)


def _features(images: Tensor, targets: Tensor, maps: Tensor, whitening: Floats) -> Tensor:
    target = targets.reshape(len(targets), -1)
    seen, inside = warped(images, maps)
    weights = agreeing(seen, target, inside)
    overlap = inside.sum(dim=1).clamp_min(1)
    detail_seen, detail_target = detail(seen, SMOOTHED), detail(target, SMOOTHED)
    of_tiles, contrast = correlation(tiles(seen, TILES), tiles(target, TILES), tiles(inside, TILES) + 1e-3)
    of_tiles, contrast = of_tiles.reshape(len(target), -1), contrast.reshape(len(target), -1)
    ordered = of_tiles.sort(dim=1).values
    textured = (contrast > TEXTURED).float()
    count = of_tiles.shape[1]
    return torch.stack(
        [
            correlation(seen, target, inside)[0],
            correlation(seen, target, weights)[0],
            (weights > 0.5).float().sum(dim=1) / overlap,
            inside.mean(dim=1),
            correlation(detail_seen, detail_target, inside)[0],
            correlation(detail_seen, detail_target, weights)[0],
            *(ordered[:, at] for at in (0, count // 4 - 1, count // 2 - 1, 3 * count // 4 - 1)),
            (of_tiles * contrast).sum(dim=1) / contrast.sum(dim=1).clamp_min(1e-3),
            ((of_tiles > 0.85) * textured).mean(dim=1),
            textured.mean(dim=1),
            _whitened_similarity(seen, target, whitening),
            *shape(maps),
        ],
        dim=1,
    )


def _whitened_similarity(seen: Tensor, target: Tensor, whitening: Floats) -> Tensor:
    operator = torch.from_numpy(views.cells().T @ whitening)
    return functional.cosine_similarity(seen @ operator, target @ operator, dim=1)
