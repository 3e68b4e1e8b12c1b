"""What a training image costs the loader on one core: decoding, then 2 x 224 and 8 x 98 pixel crops.

    python benchmarks/loader.py POOL.tar [ROUNDS]

24 photographs of the tar, those whose sides are nearest to 463 x 392 pixels; the median round, each part by itself. Then each operation
beside Pillow's on the same photographs, in dB (peak signal to noise; 48 dB is one step of 255 everywhere).
"""

from __future__ import annotations

import json
import statistics
import sys
import tarfile
import time

import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.training.augment import augment, crop_box
from lodeset.training.config import CropsConfig

PHOTOGRAPHS, SIDES = 24, (463, 392)
LIMIT = 100_000_000  # pixels
CROPS = CropsConfig(global_size=224, local_size=98, local_count=8, blur_sigma=(0.1, 2.0))


def photographs(path: str, count: int = PHOTOGRAPHS) -> list[bytes]:
    found = []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None or member.size < 8_000:
                continue
            data = file.read()
            width, height = decode(data, LIMIT).size
            found.append((abs(np.log(width / SIDES[0])) + abs(np.log(height / SIDES[1])), member.name, data))
    return [data for _, _, data in sorted(found)[:count]]


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-4, ((one.astype(float) - other.astype(float)) ** 2).mean())))


def beside_pillow(images: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """The lowest and the median of all photographs, by operation."""
    nothing = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "jitter": 1.0}
    plain = {
        "flip": 0.0,
        "jitter": 0.0,
        "grey": 0.0,
        "solarise": 0.0,
        "blur": (0.0, 0.0, 0.0),
        "global_scale": (1.0, 1.0),
    }
    small = {"global_size": 224, "local_count": 0}

    def crop(image: np.ndarray, **knobs: object) -> np.ndarray:
        """The second global crop, of nearly the whole image, with one operation."""
        config = CropsConfig.model_validate({**small, **plain, **knobs})
        return augment(image, np.random.default_rng(0), config).global_views[1].transpose(1, 2, 0)

    found: dict[str, list[float]] = {}
    for image in images:
        height, width, _ = image.shape
        side = min(height, width)
        square = np.ascontiguousarray(image[:side, :side])  # the whole of a square is the one box of its area
        whole = Image.fromarray(crop(square))
        # What augment draws for the second crop of seed 0, with nothing else drawn in between.
        rng = np.random.default_rng(0)
        for _ in range(2):
            crop_box(rng, side, side, (1.0, 1.0))
            rng.random(5), rng.uniform(0.1, 0.6), rng.permutation(4)
            brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4)
        hsv = np.array(whole.convert("HSV"))
        hsv[..., 0] += np.uint8(round(256 * 0.1 * hue) % 256)
        pairs = {
            "resize": (crop(square), Image.fromarray(square).resize((224, 224), Image.Resampling.BICUBIC)),
            "brightness": (
                crop(square, **nothing | {"brightness": 0.4}),
                ImageEnhance.Brightness(whole).enhance(1 + 0.4 * brightness),
            ),
            "contrast": (
                crop(square, **nothing | {"contrast": 0.4}),
                ImageEnhance.Contrast(whole).enhance(1 + 0.4 * contrast),
            ),
            "saturation": (
                crop(square, **nothing | {"saturation": 0.4}),
                ImageEnhance.Color(whole).enhance(1 + 0.4 * saturation),
            ),
            "hue": (crop(square, **nothing | {"hue": 0.1}), Image.fromarray(hsv, "HSV").convert("RGB")),
            "grey": (crop(square, grey=1.0), whole.convert("L").convert("RGB")),
            "solarise": (crop(square, solarise=1.0), ImageOps.solarize(whole, 128)),
            "blur": (
                crop(square, blur=(0.0, 1.0, 0.0), blur_sigma=(1.0, 1.0)),
                whole.filter(ImageFilter.GaussianBlur(1.0)),
            ),
        }
        for name, (ours, theirs) in pairs.items():
            found.setdefault(name, []).append(decibels(ours, np.asarray(theirs)))
    return {name: {"lowest": round(min(x), 1), "median": round(statistics.median(x), 1)} for name, x in found.items()}


def main() -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    encoded = photographs(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    decoding, cropping = [], []
    for number in range(rounds + 2):
        started = time.thread_time()
        images = [np.asarray(decode(data, LIMIT)) for data in encoded]
        decoded = time.thread_time()
        for i, image in enumerate(images):
            augment(image, np.random.default_rng((number, i)), CROPS)
        if number >= 2:  # warm
            decoding.append((decoded - started) * 1e3 / len(encoded))
            cropping.append((time.thread_time() - decoded) * 1e3 / len(encoded))
    height, width = np.mean([image.shape[:2] for image in images], axis=0)
    result = {
        "photographs": len(images),
        "mean_pixels": f"{width:.0f} x {height:.0f}",
        "decode_ms": round(statistics.median(decoding), 2),
        "crops_ms": round(statistics.median(cropping), 2),
        "ms_an_image": round(statistics.median(a + b for a, b in zip(decoding, cropping, strict=True)), 2),
    }
    print(json.dumps(result))
    print(json.dumps({"dB beside Pillow": beside_pillow(images)}))


if __name__ == "__main__":
    main()
