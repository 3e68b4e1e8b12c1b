"""What a training image costs the loader on one core: decoding, then 2 x 224 and 8 x 98 pixel crops.

    python benchmarks/loader.py POOL.tar [ROUNDS]

24 photographs of the tar, those whose sides are nearest to 463 x 392 pixels; the median round, each part by itself.
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

from pipeline.algorithms.images import decode
from training.augment import augment
from training.config import CropsConfig

PHOTOGRAPHS, SIDES = 24, (463, 392)
LIMIT = 100_000_000  # pixels
CROPS = CropsConfig(global_size=224, local_size=98, local_count=8, blur_sigma=(0.1, 2.0))


def photographs(path: str) -> list[bytes]:
    found = []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None or member.size < 8_000:
                continue
            data = file.read()
            width, height = decode(data, LIMIT).size
            found.append((abs(np.log(width / SIDES[0])) + abs(np.log(height / SIDES[1])), member.name, data))
    return [data for _, _, data in sorted(found)[:PHOTOGRAPHS]]


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


if __name__ == "__main__":
    main()
