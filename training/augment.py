"""Multi-crop augmentation of one image (DINOv2, appendix B), a function of the image and a random generator alone.

Shapes: H x W image pixels, S side of a crop; a crop is float32 [3, S, S], normalised with ImageNet's statistics.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.config import CropsConfig

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
ASPECT = (3 / 4, 4 / 3)  # width / height of the cropped area

Pixels = NDArray[np.float32]
Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels


@dataclass(frozen=True)
class Crops:
    """Views of one image: global [2, 3, S, S] and local [local_count, 3, s, s]."""

    global_views: Pixels
    local_views: Pixels


def augment(image: NDArray[np.uint8], rng: np.random.Generator, config: CropsConfig) -> Crops:
    """Two global and `config.local_count` local crops of an RGB image [H, W, 3] of any size from 1 x 1 up."""
    picture = Image.fromarray(image)
    first_blur, second_blur, local_blur = config.blur

    def view(size: int, scale: tuple[float, float], blur: float, solarise: float) -> Pixels:
        box = crop_box(rng, picture.width, picture.height, scale)
        # reducing_gap: a huge area is first shrunk by an integer factor, which costs no visible quality at 3.
        crop = picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        return _distort(np.asarray(crop, dtype=np.float32) / np.float32(255), rng, config, blur, solarise)

    local = [view(config.local_size, config.local_scale, local_blur, 0.0) for _ in range(config.local_count)]
    return Crops(
        global_views=np.stack(
            [
                view(config.global_size, config.global_scale, first_blur, 0.0),
                view(config.global_size, config.global_scale, second_blur, config.solarise),
            ]
        ),
        local_views=np.stack(local) if local else np.empty((0, 3, config.local_size, config.local_size), np.float32),
    )


def crop_box(rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]) -> Box:
    """A random box of whole pixels inside the image: area uniform in `scale`, aspect log-uniform in 3/4 to 4/3.

    Ten draws may fail to fit (a very long image); then the largest centred box of an allowed aspect is taken.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ASPECT)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ASPECT[1])))
    h = min(height, max(1, round(width / ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def normalise(pixels: Pixels) -> Pixels:
    """[S, S, 3] in 0 to 1 -> [3, S, S] with ImageNet's mean and deviation."""
    return np.ascontiguousarray(((pixels - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1))


def _distort(pixels: Pixels, rng: np.random.Generator, config: CropsConfig, blur: float, solarise: float) -> Pixels:
    # Every decision is drawn, taken or not: changing one probability leaves the other draws as they were.
    flip, jitter, grey, blurred, solarised = rng.random(5)
    sigma = float(rng.uniform(*config.blur_sigma))
    order = rng.permutation(4)
    brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4)
    if flip < config.flip:
        pixels = pixels[:, ::-1]
    if jitter < config.jitter:
        for step in order:
            if step == 0:
                pixels = _blend(pixels, np.float32(0), 1 + brightness * config.brightness)
            elif step == 1:
                pixels = _blend(pixels, (pixels @ GREY_WEIGHTS).mean(), 1 + contrast * config.contrast)
            elif step == 2:
                pixels = _blend(pixels, (pixels @ GREY_WEIGHTS)[..., None], 1 + saturation * config.saturation)
            else:
                pixels = _turn_hue(pixels, hue * config.hue)
    if grey < config.grey:
        pixels = np.repeat((pixels @ GREY_WEIGHTS)[..., None], 3, axis=2)
    if blurred < blur:
        pixels = cv2.GaussianBlur(np.ascontiguousarray(pixels), (0, 0), sigma).astype(np.float32, copy=False)
    if solarised < solarise:
        pixels = np.where(pixels >= 128 / 255, 1 - pixels, pixels)
    return normalise(pixels)


def _blend(pixels: Pixels, other: Pixels | np.float32, factor: float) -> Pixels:
    return np.clip(other + np.float32(factor) * (pixels - other), 0, 1)


def _turn_hue(pixels: Pixels, turns: float) -> Pixels:
    hsv = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)  # hue in degrees for float32
    hsv[..., 0] = (hsv[..., 0] + 360 * turns) % 360
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.float32, copy=False)
