"""Random copies of many kinds and strengths, on which the verification of copies is fitted and tested."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

Generator = np.random.Generator
Picture = Image.Image

STAMPS = (
    "sample",
    "SALE 50%",
    "www.example.com",
    "copyright",
    "photo 123",
    "NEW",
    "breaking news",
    "@user",
    "draft",
    "1/24",
)


def varied(image: Picture, rng: Generator) -> tuple[Picture, tuple[str, ...]]:
    """A copy of an RGB image with one or two kinds of change, and their names."""
    names = tuple(str(n) for n in rng.choice(list(CHANGES), size=int(rng.integers(1, 3)), replace=False))
    for name in names:
        image = CHANGES[name](image, rng)
    return image, names


def _jpeg(image: Picture, rng: Generator) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(8, 70)))
    return Image.open(buffer).convert("RGB")


def _resize(image: Picture, rng: Generator) -> Picture:
    scale = math.exp(rng.uniform(math.log(0.3), math.log(1.5)))
    filters = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    size = max(8, round(image.width * scale)), max(8, round(image.height * scale))
    return image.resize(size, filters[int(rng.integers(3))])


def _crop(image: Picture, rng: Generator) -> Picture:
    """38 to 95 % of the area, anywhere."""
    across, along = rng.uniform(0.62, 1, 2)
    if across * along > 0.95:
        across, along = across * 0.95, along * 0.95
    width, height = max(6, round(image.width * across)), max(6, round(image.height * along))
    left, top = (
        int(rng.integers(0, max(1, image.width - width + 1))),
        int(rng.integers(0, max(1, image.height - height + 1))),
    )
    return image.crop((left, top, left + width, top + height))


def _mirror(image: Picture, rng: Generator) -> Picture:
    return ImageOps.mirror(image)


def _turn(image: Picture, rng: Generator) -> Picture:
    return image.transpose(Image.Transpose(int(rng.integers(1, 7))))


def _rotate(image: Picture, rng: Generator) -> Picture:
    """By 2 to 10 degrees; the corners are filled with a color, or most of them are cut off."""
    angle = float(rng.uniform(2, 10) * rng.choice([-1, 1]))
    turned = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=_colour(rng))
    if rng.random() < 0.4:
        return turned
    margin = math.tan(math.radians(abs(angle))) / 2
    x, y = round(image.width * margin), round(image.height * margin)
    return turned.crop((x, y, image.width - x, image.height - y))


def _light(image: Picture, rng: Generator) -> Picture:
    image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.6, 1.6)))
    image = ImageEnhance.Contrast(image).enhance(float(rng.uniform(0.6, 1.5)))
    gamma = float(rng.uniform(0.6, 1.6))
    return image.point([min(255, round(255 * (value / 255) ** gamma)) for value in range(256)] * 3)


def _tint(image: Picture, rng: Generator) -> Picture:
    if rng.random() < 0.5:
        return image.convert("L").convert("RGB")
    return _clipped(np.asarray(image) * rng.uniform(0.7, 1.3, 3))


def _blur(image: Picture, rng: Generator) -> Picture:
    return image.filter(ImageFilter.GaussianBlur(min(image.size) * float(rng.uniform(0.008, 0.035))))


def _noise(image: Picture, rng: Generator) -> Picture:
    return _clipped(np.asarray(image) + rng.normal(0, rng.uniform(4, 20), (image.height, image.width, 3)))


def _sharpen(image: Picture, rng: Generator) -> Picture:
    return ImageEnhance.Sharpness(image).enhance(float(rng.uniform(2, 6)))


def _palette(image: Picture, rng: Generator) -> Picture:
    return image.quantize(int(rng.choice([8, 16, 32, 64]))).convert("RGB")


def _stamp(image: Picture, rng: Generator) -> Picture:
    """Text, half of the time on a box."""
    stamped = image.copy()
    draw = ImageDraw.Draw(stamped)
    size = max(7, int(image.height * rng.uniform(0.08, 0.25)))
    place = image.width * rng.uniform(-0.05, 0.6), image.height * rng.uniform(0, 0.85)
    words, colour = str(rng.choice(STAMPS)), _colour(rng)
    if rng.random() < 0.5:
        left, top, right, bottom = draw.textbbox(place, words, font_size=size)
        around = size * 0.2
        red, green, blue = colour
        draw.rectangle(
            (left - around, top - around, right + around, bottom + around), fill=(255 - red, 255 - green, 255 - blue)
        )
    draw.text(place, words, fill=colour, font_size=size)
    return stamped


def _cover(image: Picture, rng: Generator) -> Picture:
    """A rectangle of one color over 1 to 20 % of the area."""
    covered = image.copy()
    width, height = image.width * rng.uniform(0.12, 0.45), image.height * rng.uniform(0.12, 0.45)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    ImageDraw.Draw(covered).rectangle((left, top, left + width, top + height), fill=_colour(rng))
    return covered


def _frame(image: Picture, rng: Generator) -> Picture:
    """A bar for a caption above or below, or a border on two or four sides."""
    colour, kind = _colour(rng), rng.random()
    if kind < 0.4:
        bar = max(1, round(image.height * rng.uniform(0.08, 0.25)))
        framed = Image.new("RGB", (image.width, image.height + bar), colour)
        framed.paste(image, (0, bar if kind < 0.16 else 0))
        return framed
    across, along = (max(1, round(side * rng.uniform(0.02, 0.14))) for side in image.size)
    if kind > 0.75:
        across, along = (0, along) if kind > 0.88 else (across, 0)
    return ImageOps.expand(image, (across, along, across, along), colour)


def _stretch(image: Picture, rng: Generator) -> Picture:
    return image.resize((max(8, round(image.width * rng.uniform(0.75, 1.33))), image.height), Image.Resampling.BICUBIC)


def _colour(rng: Generator) -> tuple[int, int, int]:
    if rng.random() < 0.7:
        value = int(rng.choice([0, 255]))
        return value, value, value
    red, green, blue = (int(v) for v in rng.integers(0, 256, 3))
    return red, green, blue


def _clipped(pixels: np.typing.NDArray[np.floating]) -> Picture:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


CHANGES: dict[str, Callable[[Picture, Generator], Picture]] = {
    "jpeg": _jpeg,
    "resize": _resize,
    "crop": _crop,
    "mirror": _mirror,
    "turn": _turn,
    "rotate": _rotate,
    "light": _light,
    "tint": _tint,
    "blur": _blur,
    "noise": _noise,
    "sharpen": _sharpen,
    "palette": _palette,
    "stamp": _stamp,
    "cover": _cover,
    "frame": _frame,
    "stretch": _stretch,
}
