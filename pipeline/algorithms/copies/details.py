"""Tell copies from template-mates: what differs once two images are aligned, at the scale of their finest content. P pairs.

Two receipts of one shop, two screens of one program, two cards of one suit agree almost everywhere, and key points align them
perfectly. What tells them apart is small: lines of text, digits, an emblem. So both images are drawn at up to 800 pixels on the grid of
the coarser one, and compared block by block: how well each block correlates at its best displacement, what only one of the two has,
and what differs in color. A caption or a covered corner is one connected region; other words are many small ones.

Small networks weigh the measures. They are fitted on generated copies and on images that are known to be others
(`benchmarks/fit_details.py`), and ship with the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lodeset.pipeline.algorithms.copies import shipped, verify
from lodeset.pipeline.algorithms.copies.scorer import arrays_of, scorer_of
from lodeset.pipeline.algorithms.images.decoding import THUMBNAIL_SIDE

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]

# Long side of the images that are compared: smaller text is not legible. Small images are enlarged: blocks are to hold details.
LONGEST, SHORTEST = 800, 256
BLOCK, STEP, REACH = 24, 12, 5
SURROUNDINGS = 5  # steps
COARSE = 160  # long side of the drawing on which the map is corrected first
TEXTURED = 4.0  # deviation of the luminance of a block that holds something
BLURRED = 0.8  # pixels: both are blurred so, which forgives a difference in sharpness
TRUSTED = 0.6  # correlation from which a block's displacement corrects the map
LEAST_BLOCKS = 6
FEATURES = (
    "blocks",  # log of the number of textured ones
    "textured_in_both",  # share of those textured in any
    "mean_correlation",  # of blocks textured in any; 0 where only one of the two is
    "lowest_tenth",
    "lower_quarter",
    "median",
    "below_half",  # share of blocks
    "below_half_without_largest",  # the largest connected region left out
    "below_eight_tenths",
    "below_eight_tenths_without_largest",
    "largest_region",  # share of the blocks
    "regions",  # log of the number of connected regions below half
    "weighted_correlation",  # by contrast
    "only_first",  # share of the contrast that only one has
    "only_second",
    "other_content",  # log of the number of blocks textured in both that do not correlate: other words, where a stamp adds contrast
    "other_regions",  # log of the number of their regions
    "color_difference",  # mean over blocks, flat ones too, after one color map for all
    "color_apart",  # share of blocks
    "color_apart_without_largest",  # the largest connected region left out
    "color_regions",  # log of their number
    "color_map",  # how far the color map is from none
    "colors",  # log of the number of colors of the second image
    "displaced",  # from their surroundings, pixels, median
    "displaced_most",  # 90 % quantile
    "overlap_first",  # share of the area
    "overlap_second",
    "log_scale",
    "log_resolution",  # original pixels per drawn pixel of the coarser image
    "log_sharpness",  # ratio of fine detail
)


def score(features: Floats) -> Floats:
    """Log-odds [P] that pairs with these features [P, F] show the same down to their details."""
    return scorer_of(arrays_of(shipped.DETAILS)).score(features)


@dataclass(frozen=True)
class Drawing:
    """An image to be compared: RGB [H, W, 3], and pixels of it per pixel of the original."""

    pixels: Bytes
    scale: float


def drawing(image: Image.Image) -> Drawing:
    """An RGB image at the size at which it is compared."""
    longest = max(image.size)
    scale = min(1.0, LONGEST / longest)
    if longest < SHORTEST:
        scale = SHORTEST / longest
    if scale != 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX)
    return Drawing(np.asarray(image.convert("RGB")), scale)


def upright(first: Drawing, second: Drawing) -> Doubles | None:
    """The map of two images without common key points whose thumbnails agree as they are, or mirrored; None for others."""
    thumbnails = np.stack([_thumbnail(first), _thumbnail(second)])
    agreement, turned = verify.agreement(thumbnails, np.array([0]), np.array([1]))
    if agreement[0] < verify.AGREE_REFERENCE:
        return None
    return np.array([[-1.0 if turned[0] else 1.0, 0, 0], [0, 1, 0]])


def _thumbnail(image: Drawing) -> Bytes:
    grey = cv2.cvtColor(image.pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small.reshape(-1), np.uint8)


@dataclass(frozen=True)
class Comparison:
    """Two images on one grid, and what differs between them. n blocks of BLOCK x BLOCK pixels.

    Attributes:
        features: [F], see FEATURES.
        first, second: [H, W, 3], drawn on the grid; `inside`: [H, W], 1 where the first image has pixels.
        places: [n, 2] (x, y) of the first pixel of each block.
        unlike: [n], blocks with content that do not correlate, or that only one of the two has: those of `below_half`.
        recolored: [n], blocks that agree, or are flat, and differ in color: those of `color_apart`.
    """

    features: Floats
    first: Bytes
    second: Bytes
    inside: Bytes
    places: Floats
    unlike: Flags
    recolored: Flags


def measured(first: Drawing, second: Drawing, unit_map: Doubles) -> Floats | None:
    """The features [F] of a pair; None where `compared` finds nothing to compare."""
    found = compared(first, second, unit_map)
    return None if found is None else found.features


def compared(first: Drawing, second: Drawing, unit_map: Doubles) -> Comparison | None:
    """A pair block by block; None if the two share next to nothing, or nothing with texture.

    Args:
        unit_map: [2, 3], from the second image's coordinates, -1 to 1, to the first's, as in `edges`.
    """
    drawn = _drawn(first, second, unit_map)
    if drawn is None:
        return None
    a, b, inside, facts = drawn
    grey_a, grey_b = _grey(a), _grey(b)
    found = _blocks(grey_a, grey_b, inside, STEP, REACH)
    if found is None:
        return None
    contrast_a, contrast_b, grid, correlation = (
        found.contrast_first,
        found.contrast_second,
        found.places,
        found.correlation,
    )
    textured = np.maximum(contrast_a, contrast_b) > TEXTURED
    if textured.sum() < LEAST_BLOCKS:
        return None
    # Contrast of copies may be lower everywhere: what counts is which of the two has more than usual.
    gain = float(np.median(contrast_a[textured] + 1) / np.median(contrast_b[textured] + 1))
    both = textured & (contrast_a > TEXTURED * min(1, gain)) & (contrast_b * gain > TEXTURED * min(1, gain))
    value = np.where(both, correlation, 0)
    some = np.sort(value[textured])
    weight = (contrast_a + contrast_b * gain) / 2
    bad, poor = textured & (value < 0.5), textured & (value < 0.8)
    count = int(textured.sum())
    largest_bad, regions = _regions(bad, grid)
    largest_poor, _ = _regions(poor, grid)
    alone = textured & ~both
    total = float(weight[textured].sum())
    color, recolored = _color(a, b, ~textured | (value > 0.5), grid)
    other = (
        both
        & (correlation < 0.5)
        & (np.minimum(contrast_a, contrast_b * gain) > np.maximum(contrast_a, contrast_b * gain) / 2)
    )
    moved = found.apart[both] if both.any() else np.array([REACH])
    sharp_a, sharp_b = (float(np.abs(cv2.Laplacian(g, cv2.CV_32F))[inside > 0].mean()) for g in (grey_a, grey_b))
    features = (
        np.log(count),
        float(both.sum()) / count,
        float(some.mean()),
        *(float(some[int(share * count)]) for share in (0.1, 0.25, 0.5)),
        bad.sum() / count,
        (bad.sum() - largest_bad) / count,
        poor.sum() / count,
        (poor.sum() - largest_poor) / count,
        largest_bad / count,
        np.log1p(regions),
        float((value * weight)[textured].sum()) / total,
        float(weight[alone & (contrast_a > contrast_b * gain)].sum()) / total,
        float(weight[alone & (contrast_a <= contrast_b * gain)].sum()) / total,
        np.log1p(other.sum()),
        np.log1p(_regions(other, grid)[1]),
        *color,
        float(np.median(moved)),
        float(np.quantile(moved, 0.9)),
        *facts,
        abs(float(np.log((sharp_a + 1) / (sharp_b + 1)))),
    )
    return Comparison(np.array(features, np.float32), a, b, inside, grid, bad, recolored)


# -- drawing


def _drawn(first: Drawing, second: Drawing, unit_map: Doubles) -> tuple[Bytes, Bytes, Bytes, tuple[float, ...]] | None:
    """Both on one grid, aligned [H, W, 3]; where the first has pixels; and what the map says."""
    to_first = _pixels(first) @ np.vstack([unit_map, [0, 0, 1]]) @ np.linalg.inv(_pixels(second))
    enlarged = float(np.sqrt(abs(np.linalg.det(to_first[:2, :2]))))
    if not 0.02 < enlarged < 50:
        return None
    # The grid is that of the coarser image: the second's pixels, or larger ones where the first's are larger.
    cell = max(1.0, 1 / enlarged)
    height, width = (max(1, round(side / cell)) for side in second.pixels.shape[:2])
    to_second = np.diag([second.pixels.shape[1] / width, second.pixels.shape[0] / height, 1.0])
    b = _reduced(second.pixels, (width, height)) if cell > 1 else second.pixels
    whole = to_first @ to_second
    for longest, reach in ((COARSE, 4), (LONGEST, REACH)):
        whole = _corrected(first.pixels, b, whole, longest, reach)
    a, inside = _warped(first.pixels, whole, (width, height))
    shared = float((inside > 0).mean())
    area = float(np.sqrt(abs(np.linalg.det(whole[:2, :2]))))
    overlap_first = shared * width * height * area**2 / (first.pixels.shape[0] * first.pixels.shape[1])
    if shared * width * height < (BLOCK * 2) ** 2:
        return None
    resolution = min(cell / second.scale, area / first.scale)
    facts = min(1.0, overlap_first), shared, abs(float(np.log(enlarged))), float(np.log(resolution))
    return a, b, inside, facts


def _reduced(image: Bytes, size: tuple[int, int]) -> Bytes:
    """To (width, height); each pixel is the mean of what it covers."""
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _grey(image: Bytes) -> Bytes:
    return np.asarray(cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), BLURRED), np.uint8)


def _pixels(image: Drawing) -> Doubles:
    """Coordinates of -1 to 1 to pixels."""
    height, width = image.pixels.shape[:2]
    return np.array([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])


def _warped(image: Bytes, whole: Doubles, size: tuple[int, int]) -> tuple[Bytes, Bytes]:
    """An image drawn through a map [3, 3] from the grid's pixels to its own, without aliasing, and where it is."""
    scale = float(np.sqrt(abs(np.linalg.det(whole[:2, :2]))))
    if scale > 1.2:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), 0.45 * scale), np.uint8)
    # OpenCV counts from the center of the first pixel.
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    matrix = (np.linalg.inv(half) @ whole @ half)[:2]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    drawn = cv2.warpAffine(image, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    there = np.full(image.shape[:2], 255, np.uint8)
    inside = cv2.warpAffine(there, matrix, size, flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(drawn, np.uint8), (np.asarray(inside) > 250).astype(np.uint8)


def _corrected(image: Bytes, target: Bytes, whole: Doubles, longest: int, reach: int) -> Doubles:
    """The map after blocks have been matched: least squares over their displacements, those far off left out."""
    height, width = target.shape[:2]
    shrink = min(1.0, longest / max(height, width))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    small = _reduced(target, size) if shrink < 1 else target
    to_target = np.diag([width / size[0], height / size[1], 1.0])
    drawn, inside = _warped(image, whole @ to_target, size)
    found = _blocks(_grey(drawn), _grey(small), inside, BLOCK, reach)
    if found is None:
        return whole
    good = (found.best > TRUSTED) & (np.minimum(found.contrast_first, found.contrast_second) > TEXTURED)
    if good.sum() < 4:
        return whole
    middle = found.places[good] + BLOCK / 2
    seen = middle + found.shifts[good]
    weight = found.best[good]
    design = np.column_stack([middle, np.ones(len(middle))])
    fitted = np.vstack([np.eye(2), [0, 0]])
    for _ in range(5):
        fitted, *_ = np.linalg.lstsq(design * weight[:, None], seen * weight[:, None], rcond=None)
        left = np.hypot(*(seen - design @ fitted).T)
        weight = found.best[good] / (1 + (left / 1.0) ** 2)
    step = np.eye(3)
    step[:2] = fitted.T
    if np.abs(step - np.eye(3))[:2, :2].max() > 0.2 or np.linalg.matrix_rank(design) < 3:
        return whole
    return whole @ to_target @ step @ np.linalg.inv(to_target)


# -- blocks


@dataclass(frozen=True)
class _Blocks:
    """The n blocks of the second image that lie inside the first.

    Attributes:
        places: [n, 2] (x, y) of the first pixel.
        contrast_first, contrast_second: [n], deviation of the luminance.
        shifts: [n, 2], where the block correlates best; `apart`: [n], how far from there its surroundings do, pixels.
        best: [n], how well.
        correlation: [n], how well it correlates near where its surroundings do: what moved with them. Among many places other words
            correlate somewhere.
    """

    places: Floats
    contrast_first: Floats
    contrast_second: Floats
    shifts: Floats
    apart: Floats
    best: Floats
    correlation: Floats


def _blocks(a: Bytes, b: Bytes, inside: Bytes, step: int, reach: int) -> _Blocks | None:
    """None if there is no block."""
    height, width = b.shape
    if height < BLOCK or width < BLOCK:
        return None
    ys, xs = np.mgrid[0 : height - BLOCK + 1 : step, 0 : width - BLOCK + 1 : step].reshape(2, -1)
    keep = _means(inside.astype(np.float32), BLOCK)[ys, xs] > 0.95
    ys, xs = ys[keep], xs[keep]
    if not len(ys):
        return None
    contrast_a, contrast_b = (_deviation(x, BLOCK)[ys, xs] for x in (a, b))
    around = cv2.copyMakeBorder(a, reach, reach, reach, reach, cv2.BORDER_REPLICATE)
    side = 2 * reach + 1
    everywhere = np.zeros((len(ys), side, side), np.float32)
    for n in np.flatnonzero(np.minimum(contrast_a, contrast_b) > 1.0).tolist():
        y, x = int(ys[n]), int(xs[n])
        window = around[y : y + BLOCK + 2 * reach, x : x + BLOCK + 2 * reach]
        everywhere[n] = cv2.matchTemplate(window, b[y : y + BLOCK, x : x + BLOCK], cv2.TM_CCOEFF_NORMED)
    everywhere = everywhere.clip(-1, 1)
    flat = everywhere.reshape(len(ys), -1)
    at, best = flat.argmax(axis=1), flat.max(axis=1)
    shifts = np.column_stack([at % side, at // side]).astype(np.float32) - reach
    shifts[best <= 0] = 0
    rows, columns = ys // step, xs // step
    expected = _smooth(shifts, np.maximum(best, 0) ** 4, rows, columns)
    x, y = (np.rint(expected + reach).astype(int).clip(1, side - 2)).T
    offsets = np.arange(-1, 2)
    near = everywhere[
        np.arange(len(ys))[:, None, None], y[:, None, None] + offsets[:, None], x[:, None, None] + offsets
    ]
    correlation = near.reshape(len(ys), -1).max(axis=1)
    apart = np.hypot(*(shifts - expected).T)
    return _Blocks(
        np.column_stack([xs, ys]).astype(np.float32), contrast_a, contrast_b, shifts, apart, best, correlation
    )


def _smooth(shifts: Floats, weight: Floats, rows: Ints, columns: Ints) -> Floats:
    """The displacement [n, 2] of each block's surroundings: the weighted mean over SURROUNDINGS x SURROUNDINGS blocks."""
    sums = np.zeros((rows.max() + 1, columns.max() + 1, 3), np.float32)
    sums[rows, columns] = np.column_stack([shifts * weight[:, None], weight])
    sums = cv2.boxFilter(sums, -1, (SURROUNDINGS, SURROUNDINGS), normalize=False, borderType=cv2.BORDER_CONSTANT)[
        rows, columns
    ]
    return np.asarray(sums[:, :2] / np.maximum(sums[:, 2:], 1e-6), np.float32)


def _means(values: Floats, block: int) -> Floats:
    """The mean over the block that begins at each pixel."""
    found = cv2.boxFilter(values, -1, (block, block), anchor=(0, 0), normalize=True, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(found, np.float32)


def _deviation(grey: Bytes, block: int) -> Floats:
    """Of the block that begins at each pixel."""
    values = grey.astype(np.float32)
    mean = _means(values, block)
    return np.sqrt(np.maximum(_means(values * values, block) - mean * mean, 0))


def _regions(which: Flags, grid: Floats) -> tuple[int, int]:
    """The number of blocks in the largest connected region, and the number of regions."""
    if not which.any():
        return 0, 0
    rows, columns = (grid[:, 1] / STEP).astype(int), (grid[:, 0] / STEP).astype(int)
    picture = np.zeros((rows.max() + 1, columns.max() + 1), np.uint8)
    picture[rows[which], columns[which]] = 1
    count, labels = cv2.connectedComponents(picture, connectivity=8)
    return int(np.bincount(labels.ravel())[1:].max()), count - 1


def _color(a: Bytes, b: Bytes, counted: Flags, grid: Floats) -> tuple[tuple[float, ...], Flags]:
    """What differs in the mean colors of these blocks, once one map of colors has been fitted for all of them; and which
    blocks [n] do.
    """
    different = np.zeros(len(counted), bool)
    if counted.sum() < LEAST_BLOCKS:
        return (0.0,) * 6, different
    places = grid[counted].astype(int)
    left, right = (_means(x.astype(np.float32), BLOCK)[places[:, 1], places[:, 0]] for x in (a, b))
    design, start = np.column_stack([left, np.ones(len(left))]), np.vstack([np.eye(3), np.zeros(3)])
    # As if another quarter of the blocks had not changed: few colors are no reason for another map.
    ridge = np.diag([900.0, 900.0, 900.0, 0.1]) * len(left) / 4
    weight, fitted = np.ones(len(left)), start
    for _ in range(4):
        weighted = design * weight[:, None]
        fitted = np.linalg.solve(weighted.T @ design + ridge, weighted.T @ right + ridge @ start)
        apart = np.abs(right - design @ fitted).max(axis=1)
        weight = 1 / (1 + (apart / 8) ** 2)
    different[np.flatnonzero(counted)[apart > 24]] = True
    largest, regions = _regions(different, grid)
    colors = len(np.unique((right / 32).astype(int) @ np.array([1, 8, 64])))
    features = (
        float(apart.mean()) / 16,
        float(different.sum()) / len(left),
        float(different.sum() - largest) / len(left),
        float(np.log1p(regions)),
        float(np.abs(fitted - start)[:3].max()),
        float(np.log(colors)),
    )
    return features, different
