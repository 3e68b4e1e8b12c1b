"""Faces: found by an ONNX detector, blurred in the pixels. N boxes (left, top, right, bottom)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from lodeset.pipeline.embedders import onnx
from lodeset.pipeline.embedders.preprocess import normalised
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.filters.config import FACES_SIDE, Faces
from lodeset.pipeline.filters.models import FACES_KEY, detector_network

SIGMA = 0.1  # of the diagonal of an image's largest face

Boxes = NDArray[np.float64]


def detector(config: Faces, threads: int) -> Callable[[Image.Image], Boxes]:
    """A function of an RGB image that returns the boxes of at least the threshold's score, float64 [N, 4] in its pixels.

    Raises:
        LodesetError: the file is missing or broken, or its outputs are not boxes and scores as `Faces` says.
    """
    model = onnx.opened(detector_network(config), threads, FACES_KEY, f"the face detector {config.path}", FACES_SIDE)
    side = model.recipe.side if config.boxes == "pixels" else 1.0

    def detect(image: Image.Image) -> Boxes:
        outputs = model.run(normalised(image, model.recipe)[None], model.outputs)
        boxes, scores = _boxes_and_scores(outputs, config)
        found = boxes[scores >= config.threshold]
        return np.asarray(found / side * [image.width, image.height, image.width, image.height], np.float64)

    return detect


def _boxes_and_scores(outputs: list[NDArray[Any]], config: Faces) -> tuple[Boxes, Boxes]:
    """The network's two outputs, told apart by their shapes."""
    shapes = [list(out.shape) for out in outputs]
    batched = any(out.ndim == 3 for out in outputs)
    one = [out[0] if batched and out.ndim > 1 and out.shape[0] == 1 else out for out in outputs]
    boxes = [out for out in one if out.ndim == 2 and out.shape[1] == 4]
    scores = [out for out in one if out.ndim == 1]
    if len(outputs) != 2 or len(boxes) != 1 or len(scores) != 1 or len(boxes[0]) != len(scores[0]):
        raise LodesetError(
            f"the face detector {config.path} gives {shapes}; what is understood is two outputs, boxes [N, 4] with "
            "scores [N], or [1, N, 4] with [1, N]: export it with its decoding of boxes and without the class of the background"
        )
    found, score = boxes[0].astype(np.float64), scores[0].astype(np.float64)
    if not np.isfinite(found).all() or not np.isfinite(score).all():
        raise LodesetError(f"the face detector {config.path} gives boxes or scores that are no finite numbers")
    sure = found[score >= config.threshold]
    if config.boxes == "normalised" and sure.size and np.abs(sure).max() > 2:
        raise LodesetError(
            f"the face detector {config.path} gives a box of {np.round(sure[np.abs(sure).max(axis=1).argmax()], 2).tolist()}, "
            "which are no shares of the image: set filter.faces.boxes to pixels"
        )
    return found, score


def blurred(image: Image.Image, boxes: Boxes, expand: float) -> Image.Image | None:
    """The image with its boxes blurred as in face-obfuscated ImageNet (Yang et al., ICML 2022): boxes [N, 4] in pixels grow by
    `expand` of their diagonal, the Gaussian has SIGMA of the largest diagonal, and borders are smooth.

    None if no box covers a pixel.
    """
    width, height = image.size
    mask = Image.new("L", image.size, 0)
    draw, largest = ImageDraw.Draw(mask), 0.0
    for left, top, right, bottom in boxes:
        diagonal = float(np.hypot(right - left, bottom - top))
        grow = expand * diagonal
        cut = (
            max(0.0, left - grow),
            max(0.0, top - grow),
            min(width - 1.0, right + grow),
            min(height - 1.0, bottom + grow),
        )
        if right > left and bottom > top and cut[0] <= cut[2] and cut[1] <= cut[3]:
            draw.rectangle(cut, fill=255)
            largest = max(largest, diagonal)
    if not largest:
        return None
    sigma = SIGMA * largest
    # Smooth outwards only: within a box nothing of the face shows through.
    smooth = mask.filter(ImageFilter.GaussianBlur(sigma / 4))
    smooth.paste(255, mask=mask)
    return Image.composite(image.filter(ImageFilter.GaussianBlur(sigma)), image, smooth)
