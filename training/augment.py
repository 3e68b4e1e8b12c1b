"""Multi-crop augmentation of one image (DINOv2, appendix B), determined by the image and a random generator alone.

All operations work on 8-bit pixels, as in Pillow: PyTorch's antialiased bicubic filter for 8-bit images resizes a crop
(within 68 dB or better of Pillow's), lookup tables change brightness and contrast and solarize, and the hue is shifted
in 8 bits.

Shapes: H x W image pixels, S side of a crop; a crop is uint8 [3, S, S].
"""

import math
from dataclasses import dataclass
from itertools import permutations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lodeset.training.config import CropsConfig

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
LEVELS = np.arange(256, dtype=np.float32)
ASPECT = (3 / 4, 4 / 3)  # width / height of the cropped area
ORDERS = tuple(permutations(range(4)))

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom, pixels


@dataclass(frozen=True)
class Distortion:
    """The color changes of one crop, and whether it is mirrored.

    order: of brightness (0), contrast (1), saturation (2) and hue (3); empty if none of them changes. The first three
    are factors; hue is in turns. sigma: standard deviation of the blur in pixels; 0 means no blur.
    """

    flip: bool
    order: tuple[int, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey: bool
    sigma: float
    solarise: bool


@dataclass(frozen=True)
class Crops:
    """Views of one image: global [2, 3, S, S] and local [local_count, 3, s, s]; `pending`: the distortions that remain
    to be applied, in the same order, if the loader does not apply them (`crops.distort: device`).
    """

    global_views: Pixels
    local_views: Pixels
    pending: tuple[Distortion, ...] = ()


def augment(image: NDArray[np.uint8], rng: np.random.Generator, config: CropsConfig) -> Crops:
    """Two global and `config.local_count` local crops of an RGB image [H, W, 3] of any size from 1 x 1 up."""
    height, width, _ = image.shape
    # [1, 3, H, W]; the memory stays H x W x 3. A read-only array is copied, because PyTorch warns about it.
    pixels = torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)[None]
    first_blur, second_blur, local_blur = config.blur
    pending: list[Distortion] = []

    def view(size: int, scale: tuple[float, float], blur: float, solarise: float) -> Pixels:
        box = crop_box(rng, width, height, scale)
        part = pixels[:, :, box[1] : box[3], box[0] : box[2]]
        crop = F.interpolate(part, size=(size, size), mode="bicubic", antialias=True)[0]
        distortion = drawn(rng, config, blur, solarise)
        if config.distort == "device":
            pending.append(distortion)
            return np.asarray(crop.numpy())
        return distorted(np.ascontiguousarray(crop.permute(1, 2, 0).numpy()), distortion).transpose(2, 0, 1)

    # Local views first: the random numbers of a view depend on how many were drawn before.
    local = [view(config.local_size, config.local_scale, local_blur, 0.0) for _ in range(config.local_count)]
    whole = [
        view(config.global_size, config.global_scale, first_blur, 0.0),
        view(config.global_size, config.global_scale, second_blur, config.solarise),
    ]
    return Crops(
        global_views=np.stack(whole),
        local_views=np.stack(local) if local else np.empty((0, 3, config.local_size, config.local_size), np.uint8),
        pending=(*pending[-2:], *pending[:-2]),
    )


def crop_box(rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]) -> Box:
    """A random box of whole pixels inside the image: area uniform in `scale`, aspect log-uniform in 3/4 to 4/3.

    If none of ten draws fits (a very long image), the largest centered box of an allowed aspect is used.
    """
    for _ in range(10):
        # One call for all numbers: drawing each by itself would cost more than a crop of 32 pixels.
        of_scale, of_aspect, of_left, of_top = rng.random(4).tolist()
        area = width * height * _between(scale, of_scale)
        aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** of_aspect
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(of_left * (width - w + 1)), int(of_top * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ASPECT[1])))
    h = min(height, max(1, round(width / ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _between(least_and_most: tuple[float, float], share: float) -> float:
    least, most = least_and_most
    return least + (most - least) * share


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float32 normalized by ImageNet's mean and deviation, on the same device."""
    mean, deviation = (torch.from_numpy(255 * x).view(3, 1, 1).to(pixels.device) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.float() - mean) / deviation


def drawn(rng: np.random.Generator, config: CropsConfig, blur: float, solarise: float) -> Distortion:
    """Draw the distortion of a view; `blur` and `solarise` are the view's probabilities."""
    # Every decision is drawn, whether it is used or not, so that changing one probability leaves the other draws
    # unchanged.
    flip, jitter, grey, blurred, solarised, sigma, order, brightness, contrast, saturation, hue = rng.random(
        11
    ).tolist()
    return Distortion(
        flip=flip < config.flip,
        order=ORDERS[int(order * len(ORDERS))] if jitter < config.jitter else (),
        brightness=1 + (2 * brightness - 1) * config.brightness,
        contrast=1 + (2 * contrast - 1) * config.contrast,
        saturation=1 + (2 * saturation - 1) * config.saturation,
        hue=(2 * hue - 1) * config.hue,
        grey=grey < config.grey,
        sigma=_between(config.blur_sigma, sigma) if blurred < blur else 0.0,
        solarise=solarised < solarise,
    )


def distorted(pixels: Pixels, distortion: Distortion) -> Pixels:
    """Apply a distortion: [S, S, 3] -> [S, S, 3]."""
    if distortion.flip:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    for step in distortion.order:
        if step == 0:
            pixels = _by_table(pixels, LEVELS * distortion.brightness)
        elif step == 1:
            mean = round(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0])
            pixels = _by_table(pixels, mean + (LEVELS - mean) * distortion.contrast)
        elif step == 2:
            pixels = np.asarray(
                cv2.addWeighted(pixels, distortion.saturation, _grey(pixels), 1 - distortion.saturation, 0), np.uint8
            )
        else:
            pixels = _hue_turned(pixels, distortion.hue)
    if distortion.grey:
        pixels = _grey(pixels)
    if distortion.sigma:
        pixels = np.asarray(cv2.GaussianBlur(pixels, (0, 0), distortion.sigma), np.uint8)
    if distortion.solarise:
        pixels = _by_table(pixels, np.where(LEVELS >= 128, 255 - LEVELS, LEVELS))
    return pixels


def _by_table(pixels: Pixels, levels: NDArray[np.floating]) -> Pixels:
    return np.asarray(cv2.LUT(pixels, levels.clip(0, 255).astype(np.uint8)))  # truncated, as in Pillow


def _grey(pixels: Pixels) -> Pixels:
    """Luma by ITU-R BT.601, repeated for three channels."""
    return np.asarray(cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def _hue_turned(pixels: Pixels, turns: float) -> Pixels:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)  # hue in 256ths of a turn, wraps around
    hsv[..., 0] += np.uint8(round(256 * turns) % 256)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))
