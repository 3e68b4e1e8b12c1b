"""Images -> the input of a network: resized, cropped and normalized. B images, 3 channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
Map = Callable[[Callable[[Image.Image], Floats], Iterable[Image.Image]], Iterable[Floats]]

# Maximum ratio of the long side to the short one without cropping: a strip of 20 x 10,000 pixels would otherwise become
# gigabytes.
LONGEST = 4
# A box filter reduces by whole factors before the resize, so that large photographs cost less.
_REDUCING_GAP = 2.0


@dataclass(frozen=True)
class Recipe:
    """How an image becomes a network's input.

    Attributes:
        resize: `square`: squeezed to side x side; `crop`: short side to `scaled`, then the center square of `side`;
            `short_side`: short side to `side`, not cropped.
        side, scaled: pixels.
        mean, std: RGB, on the 0..1 scale.
    """

    resize: Literal["square", "crop", "short_side"]
    side: int
    scaled: int
    mean: Triple
    std: Triple
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


def inputs(
    images: Sequence[Image.Image], recipe: Recipe, mapped: Map = map
) -> list[tuple[list[int], NDArray[np.float32]]]:
    """RGB images -> (their positions, float32 [B, 3, height, width]), one entry per shape, in the order of first
    appearance.

    `mapped` is `map`, or the `map` of an executor whose threads share the work.
    """
    by_shape: dict[tuple[int, ...], list[tuple[int, Floats]]] = {}
    for number, pixels in enumerate(mapped(lambda image: normalised(image, recipe), images)):
        by_shape.setdefault(pixels.shape, []).append((number, pixels))
    return [
        ([n for n, _ in group], np.ascontiguousarray(np.stack([p for _, p in group]))) for group in by_shape.values()
    ]


def normalised(image: Image.Image, recipe: Recipe) -> Floats:
    """One image as the network's input, float32 [3, height, width]."""
    scale = (1.0 / (255.0 * np.array(recipe.std))).astype(np.float32)
    shift = (np.array(recipe.mean) / np.array(recipe.std)).astype(np.float32)
    pixels = np.asarray(resized(image, recipe)).astype(np.float32) * scale - shift
    return np.asarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def resized(image: Image.Image, recipe: Recipe) -> Image.Image:
    """The image at the size of the network's input."""
    settings: dict[str, Any] = {
        "resample": Image.Resampling[recipe.interpolation.upper()],
        "reducing_gap": _REDUCING_GAP,
    }
    if recipe.resize == "square":
        return image.resize((recipe.side, recipe.side), **settings)
    width, height = image.size
    short = min(width, height)
    if recipe.resize == "short_side":
        most = LONGEST * recipe.side
        return image.resize(
            (min(most, recipe.side * width // short), min(most, recipe.side * height // short)), **settings
        )
    # The center of the resized image, computed without resizing the rest.
    whole = (recipe.scaled * width // short, recipe.scaled * height // short)
    left, top = ((length - recipe.side) // 2 for length in whole)
    x, y = width / whole[0], height / whole[1]
    box = (left * x, top * y, min(width, (left + recipe.side) * x), min(height, (top + recipe.side) * y))
    return image.resize((recipe.side, recipe.side), box=box, **settings)
