"""Samples of more than 8 bits: what is black in them and what is white.

Files of 16 bits often hold 10 or 12, floats hold 0..1 or 0..255 or metres. A range that the file declares is used where what the
file holds lies in it; otherwise the range that the image itself uses. Which one it was is told as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]
# Tile by tile, because the arithmetic takes 32 bytes a sample: 3.2 GB for an image of 100 megapixels.
TILE = 1_024
# Of the samples, how many lie below what counts as the brightest, so that a few hot pixels make no image black.
_BRIGHTEST = 99.9
# An image whose brightest samples stay below this share of a range that nobody declared would be black.
_BLACK = 1 / 8
_SAMPLED = 2**18
# A frame, a watermark or missing data is drawn in the highest value of the type, and covers no more than this share of an image.
MOST_FILLED = 0.5
_FLOAT_LIMIT = 3.0e38  # beyond it, a float says "no data"


@dataclass(frozen=True)
class Range:
    """The samples that become black and white; `source` says how they were found."""

    low: float
    high: float
    source: str

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g} ({self.source})"

    def applied(self, samples: Samples) -> NDArray[np.uint8]:
        """In 8 bits; what is no number becomes black."""
        scaled = (np.nan_to_num(samples, nan=self.low) - self.low) * (255.0 / (self.high - self.low))
        return np.clip(scaled, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Declared:
    """What a file says about its samples.

    Attributes:
        bits: samples use the lowest ones of them, where they fit.
        low, high: what black and white are.
        white_is_zero: the darkest samples are white.
        nodata: the sample that means none.
        signed: whether integers may be negative, where that is told.
    """

    bits: int | None = None
    low: float | None = None
    high: float | None = None
    white_is_zero: bool = False
    nodata: float | None = None
    signed: bool | None = None
    source: str = ""


def boxes(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Tiles as (left, top, right, bottom)."""
    for y in range(0, height, TILE):
        for x in range(0, width, TILE):
            yield x, y, min(x + TILE, width), min(y + TILE, height)


def finite(samples: NDArray[np.generic], nodata: float | None) -> Samples:
    """As 64-bit floats; what is no number is NaN."""
    out = samples.astype(np.float64)
    out[~np.isfinite(out) | (np.abs(out) > _FLOAT_LIMIT)] = np.nan
    if nodata is not None:
        out[out == nodata] = np.nan
    return out


def range_of(tiles: Iterable[Samples], count: int, kind: np.dtype[np.generic], declared: Declared) -> Range:
    """The range of an image of `count` samples that comes in tiles, whose type is `kind`."""
    low, high, some = np.inf, -np.inf, []
    step = max(1, count // _SAMPLED)
    for tile in tiles:
        flat = tile.ravel()
        flat = flat[~np.isnan(flat)]
        if flat.size:
            low, high = min(low, float(flat.min())), max(high, float(flat.max()))
            some.append(flat[::step].copy())  # a view would hold the whole tile
    if not some:
        return Range(0.0, 255.0, "no sample is a number")
    if declared.low is not None and declared.high is not None:
        # Half a step of slack: declarations are rounded.
        slack = (declared.high - declared.low) / 512
        if declared.high > declared.low and declared.low - slack <= low and high <= declared.high + slack:
            return Range(declared.low, declared.high, declared.source)
    if declared.bits is not None and low >= 0 and high < 2**declared.bits:
        return Range(0.0, 2.0**declared.bits - 1, declared.source)
    sampled = np.concatenate(some)
    if low < 0 and (above := sampled[sampled > low]).size and above.min() - low > (1 - _BLACK) * (high - low):
        low, sampled = min(0.0, float(above.min())), above  # one value far below all others means "no data"
    dark, bright = (float(v) for v in np.percentile(sampled, (100 - _BRIGHTEST, _BRIGHTEST)))
    if low < 0:
        if bright - dark < _BLACK * (high - low) and bright > dark:
            low, high = dark, bright
        return Range(low, high if high > low else low + 1, "the image's own")
    whole = kind.kind == "u" and kind.itemsize == 2
    top = _ceiling(high, kind)
    if kind.kind in "iu" and high in (65535, np.iinfo(kind.name).max):
        below = sampled[sampled < high]
        if below.size >= (1 - MOST_FILLED) * sampled.size:
            most = float(np.percentile(below, _BRIGHTEST))
            bright = most if 0 < most < _BLACK * high else bright
    if bright < _BLACK * top:
        top = _ceiling(bright, kind)
    if 0 < bright < _BLACK * top:
        top = bright if kind.kind == "f" else float(max(1, 2 ** int(bright).bit_length() - 1))
    return Range(0.0, top, "the sample type's" if whole and top == 65535 else "the image's own")


def _ceiling(top: float, kind: np.dtype[np.generic]) -> float:
    """The white that people mean who store samples up to `top`: 1 of floats, or all ones of as many bits."""
    if kind.kind == "f" and top <= 1:
        return 1.0
    if top <= 255:
        return 255.0
    return float(2 ** int(top).bit_length() - 1)
