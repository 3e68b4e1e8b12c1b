"""What the close look at a pair saw, drawn: the key points that agree, and the blocks whose details differ. Both are computed anew from
the two images by the code that dedup uses, in the worker that decodes images.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lodeset.infra.dashboard import decoding
from lodeset.pipeline.engines.processes import step
from lodeset.pipeline.errors import LodesetError

if TYPE_CHECKING:  # details come with torch: only the worker imports them, when it first compares some
    from lodeset.pipeline.algorithms.copies.details import Comparison, Drawing
    from lodeset.pipeline.algorithms.copies.keypoints import Described

Kind = Literal["points", "details"]
SIDE = 640  # of each of the two pictures
GAP = 8
QUALITY = 85
NUMBERED = 12  # key points with a number besides their color
RADIUS = 4
APART = 32  # pixels between two numbers, or else they cover each other
OUTSIDE = 0.25  # brightness that is left of what only the second image shows
UNLIKE, RECOLORED = (213, 94, 0), (0, 114, 178)  # told apart by the color-blind as well; the style sheet has them too
TINT = 0.22

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]


def drawn(first: bytes, second: bytes, kind: Kind, max_pixels: int) -> bytes:
    """Two images side by side as a WebP, with the key points that agree or the blocks that differ. They are the images of an edge in
    the order of the edge, as the comparison depends on it.

    Raises:
        PictureError: one of them is no image, or passes a limit; or there is nothing to draw.
    """
    found: bytes = decoding.worker().run(_drawn, first, second, kind, max_pixels)[0]
    return found


def _drawn(first: bytes, second: bytes, kind: Kind, max_pixels: int) -> Iterator[bytes]:
    cv2.setNumThreads(1)
    picture = _points(first, second, max_pixels) if kind == "points" else _details(first, second, max_pixels)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY)
    yield buffer.getvalue()


def _step() -> None:
    """What follows is measured on small drawings and has limits of its own."""
    step(1, decoding.CPU_S, decoding.CLOCK_S)


# -- key points


def _points(first: bytes, second: bytes, max_pixels: int) -> Image.Image:
    from lodeset.pipeline.algorithms.copies.keypoints import aligned, described

    seen: list[Described] = []
    pictures: list[Image.Image] = []
    for data in (first, second):
        image = decoding.opened(data, max_pixels)
        seen.append(described(image))
        pictures.append(_fitted(image))
    _step()
    found = aligned(*seen)
    if found is None:
        raise LodesetError("too few key points of the two images agree")
    places = [
        _scaled(of.places[rows], of, shown) for of, rows, shown in zip(seen, found.agreeing.T, pictures, strict=True)
    ]
    colors, numbers = _colors(places[0]), _spread(places[0], NUMBERED)
    for picture, at in zip(pictures, places, strict=True):
        _mark(picture, at, colors, numbers)
    return _beside(*pictures)


def _scaled(places: Floats, of: Described, picture: Image.Image) -> Floats:
    """Places on the working image [n, 2] as places on a picture of the same image."""
    height, width = of.grey.shape
    return places * np.array([picture.width / width, picture.height / height], np.float32)


def _colors(places: Floats) -> list[tuple[int, int, int]]:
    """A color for each place: those in one direction from the middle look alike, so that one sees at a glance where each part went."""
    away = places - places.mean(axis=0)
    hues = np.arctan2(away[:, 1], away[:, 0]) / (2 * np.pi) % 1
    return [_rgb(hue) for hue in hues.tolist()]


def _rgb(hue: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 1.0))
    return red, green, blue


def _spread(places: Floats, most: int) -> list[int]:
    """Up to `most` of the places, far from each other: each is the farthest from those before it."""
    chosen = [int(places.sum(axis=1).argmin())]
    nearest = np.linalg.norm(places - places[chosen[0]], axis=1)
    while len(chosen) < most and nearest.max() > APART:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(places - places[chosen[-1]], axis=1))
    return chosen


def _mark(picture: Image.Image, places: Floats, colors: list[tuple[int, int, int]], numbers: list[int]) -> None:
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(18)
    for (x, y), color in zip(places.tolist(), colors, strict=True):
        draw.circle((x, y), RADIUS + 1, fill="black")
        draw.circle((x, y), RADIUS - 0.5, fill=color)
    for number, row in enumerate(numbers, 1):
        x, y = places[row].tolist()
        # On the inner side of the point, where there is room.
        side, anchor = (1, "lm") if x < picture.width / 2 else (-1, "rm")
        draw.text((x + side * (RADIUS + 3), y), f"{number}", "white", font, anchor, stroke_width=2, stroke_fill="black")


# -- details


def _details(first: bytes, second: bytes, max_pixels: int) -> Image.Image:
    found = compared(*(_seen(decoding.opened(data, max_pixels)) for data in (first, second)))
    if found is None:
        raise LodesetError("the two images share too little to compare their details")
    unlike, recolored = (_covered(found, which) for which in (found.unlike, found.recolored))
    outside = found.inside[:, :, None] == 0
    # What the first image does not reach was not compared.
    pictures = [np.where(outside, image * OUTSIDE, image).astype(np.uint8) for image in (found.first, found.second)]
    enlarged = max(1, SIDE // max(found.first.shape))
    return _beside(*(_outlined(picture, unlike, recolored, enlarged) for picture in pictures))


def _seen(image: Image.Image) -> tuple[Described, Drawing]:
    """What dedup holds of an image while it looks at it; much smaller than the image."""
    from lodeset.pipeline.algorithms.copies import details, keypoints

    return keypoints.described(image), details.drawing(image)


def compared(first: tuple[Described, Drawing], second: tuple[Described, Drawing]) -> Comparison | None:
    """The details of a pair as dedup compares them: aligned by key points where these are trusted, or else as thumbnails agree."""
    from lodeset.pipeline.algorithms.copies import closeup, details, keypoints

    _step()
    (one, first_drawing), (other, second_drawing) = first, second
    found = keypoints.aligned(one, other)
    common = closeup.overlap(one, other, found) if found else None
    if found and common and closeup.score(closeup.measured([common]))[0] >= closeup.DOUBT:
        unit_map: NDArray[np.float64] | None = closeup.between(one, other, found).astype(np.float64)
    else:
        unit_map = details.upright(first_drawing, second_drawing)
    return None if unit_map is None else details.compared(first_drawing, second_drawing, unit_map)


def _covered(found: Comparison, which: Flags) -> Bytes:
    """Where on the grid [H, W] these blocks lie. Blocks overlap by half, so each is drawn as its middle, which no other one covers."""
    from lodeset.pipeline.algorithms.copies.details import BLOCK, STEP

    covered, edge = np.zeros(found.inside.shape, np.uint8), (BLOCK - STEP) // 2
    for x, y in found.places[which].astype(int).tolist():
        covered[y + edge : y + edge + STEP, x + edge : x + edge + STEP] = 1
    return covered


def _outlined(picture: Bytes, unlike: Bytes, recolored: Bytes, enlarged: int) -> Image.Image:
    """The picture with both kinds of blocks tinted and outlined."""
    size = picture.shape[1] * enlarged, picture.shape[0] * enlarged
    shown = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)).copy()
    for covered, color in ((unlike, UNLIKE), (recolored, RECOLORED)):
        large = cv2.resize(covered, size, interpolation=cv2.INTER_NEAREST)
        tinted = shown * (1 - TINT) + np.array(color) * TINT
        shown = np.where(large[:, :, None] > 0, tinted, shown).astype(np.uint8)
        lines, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(shown, lines, -1, color, 2)
    return Image.fromarray(shown)


# -- pictures


def _fitted(image: Image.Image) -> Image.Image:
    """The image with a longer side of SIDE pixels: small ones are enlarged, so that marks do not hide them."""
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures side by side; what lies around them is transparent, for any ground."""
    height = max(left.height, right.height)
    both = Image.new("RGBA", (left.width + GAP + right.width, height))
    both.paste(left, (0, (height - left.height) // 2))
    both.paste(right, (left.width + GAP, (height - right.height) // 2))
    return both
