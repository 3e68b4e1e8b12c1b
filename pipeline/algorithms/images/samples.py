"""Determine black and white for samples of more than 8 bits.

Files of 16 bits often contain 10 or 12, and floats may be 0..1, 0..255 or meters. A range that the file declares is
used if the samples lie within it; otherwise the range of the image itself is used. The choice is recorded as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]
# Tile by tile, because the arithmetic takes 32 bytes per sample: 3.2 GB for an image of 100 megapixels.
TILE = 1_024
# Share of the samples below the one that counts as the brightest, so that a few hot pixels do not make an image black.
_BRIGHTEST = 99.9
# An image whose brightest samples stay below this share of an undeclared range would be black.
_BLACK = 1 / 8
_SAMPLED = 2**18
# A frame, a watermark or missing data use the highest value of the type and cover at most this share of an image.
MOST_FILLED = 0.5
_FLOAT_LIMIT = 3.0e38  # larger floats mean "no data"


@dataclass(frozen=True)
class Range:
    """The samples that become black and white; `source` says how they were determined."""

    low: float
    high: float
    source: str

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g} ({self.source})"

    def applied(self, samples: Samples) -> NDArray[np.uint8]:
        """Convert to 8 bits; values that are not numbers become black."""
        scaled = (np.nan_to_num(samples, nan=self.low) - self.low) * (255.0 / (self.high - self.low))
        return np.clip(scaled, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Declared:
    """What a file declares about its samples.

    Attributes:
        bits: samples use only the lowest bits, this many, if they fit.
        low, high: the values of black and white.
        white_is_zero: the lowest samples are white.
        nodata: the value that stands for no data.
        signed: whether integers may be negative, if that is declared.
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
    """Convert to 64-bit floats; values that are not numbers become NaN."""
    out = samples.astype(np.float64)
    out[~np.isfinite(out) | (np.abs(out) > _FLOAT_LIMIT)] = np.nan
    if nodata is not None:
        out[out == nodata] = np.nan
    return out


def range_of(tiles: Iterable[Samples], count: int, kind: np.dtype[np.generic], declared: Declared) -> Range:
    """The range of an image of `count` samples that comes in tiles, with the sample type `kind`."""
    low, high, samples_drawn = np.inf, -np.inf, []
    step = max(1, count // _SAMPLED)
    for tile in tiles:
        flat = tile.ravel()
        flat = flat[~np.isnan(flat)]
        if flat.size:
            low, high = min(low, float(flat.min())), max(high, float(flat.max()))
            samples_drawn.append(flat[::step].copy())  # a view would hold the whole tile
    if not samples_drawn:
        return Range(0.0, 255.0, "no sample is a number")
    if declared.low is not None and declared.high is not None:
        # Half a step of tolerance: declarations are rounded.
        slack = (declared.high - declared.low) / 512
        if declared.high > declared.low and declared.low - slack <= low and high <= declared.high + slack:
            return Range(declared.low, declared.high, declared.source)
    if declared.bits is not None and low >= 0 and high < 2**declared.bits:
        return Range(0.0, 2.0**declared.bits - 1, declared.source)
    sampled = np.concatenate(samples_drawn)
    if low < 0 and (above := sampled[sampled > low]).size and above.min() - low > (1 - _BLACK) * (high - low):
        low, sampled = min(0.0, float(above.min())), above  # one value far below all others stands for "no data"
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
    """The probable white of samples up to `top`: 1 for floats, or all ones of the same number of bits."""
    if kind.kind == "f" and top <= 1:
        return 1.0
    if top <= 255:
        return 255.0
    return float(2 ** int(top).bit_length() - 1)
