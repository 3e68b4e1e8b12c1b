"""The map as a picture that the server draws: how many images lie where."""

from __future__ import annotations

import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.selection import Selection, rows
from lodeset.pipeline.errors import LodesetError

WIDTH, HEIGHT = 720, 480  # of the picture, in pixels
# Up to so many images, a cell is a square of so many pixels: few images would be too small to be seen.
CELLS = ((2_000, 6), (20_000, 4), (200_000, 2))
MARGIN = 1.06
SAMPLE = 50_000  # images that say where nearly all lie
_ALL, _CHOSEN = (112, 128, 150), (225, 98, 20)  # visible on light and on dark ground
_NUMBER = r"-?\d{1,6}(?:\.\d{1,9})?"
_BOX = re.compile(rf"({_NUMBER}),({_NUMBER}),({_NUMBER}),({_NUMBER})")

Box = tuple[float, float, float, float]  # left, bottom, right, top


def box_of(text: str) -> Box:
    """The part of the map that an address names, as "left,bottom,right,top".

    Raises:
        LodesetError: that is no such part.
    """
    match = _BOX.fullmatch(text)
    if match is None:
        raise LodesetError(f"box={text[:80]} is no part of the map: give left,bottom,right,top")
    left, bottom, right, top = (float(one) for one in match.groups())
    if not (right - left > 1e-6 and top - bottom > 1e-6):
        raise LodesetError(f"box={text[:80]} is empty: right and top must be the larger numbers")
    return left, bottom, right, top


def whole(data: Data) -> Box:
    """The part of the map that is shown first, as wide as a picture is: where nearly all images lie. What lies far off is left
    out, since a few such images would make a dot of all others.
    """
    sides = []
    for name in ("x", "y"):
        values = data.column(name)
        values = values[np.isfinite(values)]
        if not len(values):
            return -1.5, -1.0, 1.5, 1.0
        low, high = (float(one) for one in np.quantile(values[:: max(1, len(values) // SAMPLE)], (0.01, 0.99)))
        room = 0.15 * (high - low)
        sides.append((max(low - room, float(values.min())), min(high + room, float(values.max()))))
    (left, right), (bottom, top) = sides
    half = max((right - left) / 2 / WIDTH * HEIGHT, (top - bottom) / 2, 1e-3) * MARGIN
    middle, level, wide = (left + right) / 2, (bottom + top) / 2, half * WIDTH / HEIGHT
    return middle - wide, level - half, middle + wide, level + half


def text_of(box: Box) -> str:
    return ",".join(f"{one:.6g}" if abs(one) >= 1e-4 else "0" for one in box)


def picture(data: Data, selection: Selection, box: Box) -> bytes:
    """A WebP with transparent ground: all images in gray, and those of the selection, if it leaves some out, in a color."""
    x, y = data.column("x"), data.column("y")
    cell = next((side for most, side in CELLS if len(x) <= most), 1)
    pixels = _painted(_counts(x, y, box, cell), _ALL)
    if selection:
        some = rows(data, selection)
        above = _painted(_counts(x[some], y[some], box, cell), _CHOSEN)
        pixels[:, :, 3] //= 2
        here = above[:, :, 3] > 0
        pixels[here] = above[here]
    buffer = io.BytesIO()
    image = Image.fromarray(pixels, "RGBA").resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
    image.save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return buffer.getvalue()


def _counts(x: NDArray[np.float32], y: NDArray[np.float32], box: Box, cell: int) -> NDArray[np.int64]:
    """Images in each cell [rows, columns], the top row first; images without a place are in none."""
    left, bottom, right, top = box
    wide, high = WIDTH // cell, HEIGHT // cell
    with np.errstate(invalid="ignore"):
        column = (x - np.float32(left)) * np.float32(wide / (right - left))
        row = (np.float32(top) - y) * np.float32(high / (top - bottom))
        inside = (column >= 0) & (column < wide) & (row >= 0) & (row < high)
    cells = row[inside].astype(np.int32) * wide + column[inside].astype(np.int32)
    return np.bincount(cells, minlength=wide * high).reshape(high, wide)


def _painted(counts: NDArray[np.int64], color: tuple[int, int, int]) -> NDArray[np.uint8]:
    pixels = np.zeros((*counts.shape, 4), np.uint8)
    pixels[:, :, :3] = color
    most = int(counts.max())
    if most:
        scale = np.log1p(counts) / np.log1p(most)
        pixels[:, :, 3] = np.where(counts > 0, 70 + 185 * scale, 0)
    return pixels
