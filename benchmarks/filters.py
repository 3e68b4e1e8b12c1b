"""What the filters `min_sharpness` and `blank` would drop of a tar, and how well measures of sharpness tell blur.

    python benchmarks/filters.py POOL.tar [SHEETS]

SHEETS: a folder for contact sheets, per threshold the images that fall between it and the one below.
Measures are compared on every ninth image, as it is and blurred by a Gaussian of 1.5, 3 and 6 pixels (half that below 100
pixels a side) and rounded to 8 bits: the share caught at the threshold that drops 1 % of the images as they are, the
area under the ROC curve, and the share whose score a blur raised. One process, one thread.
"""

from __future__ import annotations

import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode, examine
from lodeset.pipeline.algorithms.images.sharpness import luminance, sharpness

Grey = NDArray[np.float32]
SHARPNESS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3)
BLANK = (0.0, 2.5, 5.0, 10.0)
SIGMAS = (1.5, 3.0, 6.0)


def laplacian_variance(grey: Grey) -> float:
    return float(cv2.Laplacian(grey, cv2.CV_32F, borderType=cv2.BORDER_REFLECT_101).var())


def laplacian_over_variance(grey: Grey) -> float:
    return laplacian_variance(grey) / (float(grey.var()) + 4.0)


def reblurred(grey: Grey) -> float:
    """The share of neighbour differences that a box of 9 pixels removes (Crete et al., SPIE 6492, 2007)."""
    removed = all_ = 0.0
    for axis, box in ((0, (1, 9)), (1, (9, 1))):
        before = np.abs(np.diff(grey, axis=axis))
        after = np.abs(np.diff(cv2.blur(grey, box, borderType=cv2.BORDER_REFLECT_101), axis=axis))
        removed += float(np.maximum(0, before - after).sum())
        all_ += float(before.sum())
    return removed / all_ if all_ else 0.0


MEASURES: dict[str, Callable[[Grey], float]] = {
    "sharpness": sharpness,
    "laplacian_variance": laplacian_variance,
    "laplacian_over_variance": laplacian_over_variance,
    "reblurred": reblurred,
}


def images(path: str) -> Iterator[bytes]:
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield file.read()


def blurred(grey: Grey, sigma: float) -> Grey:
    sigma = sigma / 2 if max(grey.shape) < 100 else sigma
    return np.rint(cv2.GaussianBlur(grey, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)).astype(np.float32)


def compared(greys: list[Grey]) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, measure in MEASURES.items():
        sharp = np.array([measure(grey) for grey in greys])
        threshold = np.quantile(sharp, 0.01)
        found[name] = {}
        for sigma in SIGMAS:
            soft = np.array([measure(blurred(grey, sigma)) for grey in greys])
            above = np.searchsorted(np.sort(soft), sharp).mean() / len(soft)
            found[name][str(sigma)] = {
                "caught_at_1_percent": round(float((soft < threshold).mean()), 3),
                "auc": round(float(above), 3),
                "raised": round(float((soft > sharp + 1e-9).mean()), 4),
            }
    return found


def sheet(path: Path, chosen: list[bytes]) -> None:
    """Up to 80 images, 10 a row."""
    canvas = Image.new("RGB", (10 * 100, 8 * 100), "white")
    for n, data in enumerate(chosen[:80]):
        image = decode(data)
        scale = 96 / max(image.size)
        small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        canvas.paste(small, (n % 10 * 100 + 2, n // 10 * 100 + 2))
    canvas.save(path)


def main() -> None:
    cv2.setNumThreads(1)
    rows: list[tuple[float, float, bytes]] = []
    greys, measuring, decoding = [], 0.0, 0.0
    for n, data in enumerate(images(sys.argv[1])):
        try:
            started = time.perf_counter()
            image = decode(data)
            decoded = time.perf_counter()
            grey = luminance(image)
            score = sharpness(grey)
            measuring, decoding = measuring + time.perf_counter() - decoded, decoding + decoded - started
            deviation = float(np.frombuffer(examine(data).thumbnail, np.uint8).std())
        except Unreadable:
            continue
        rows.append((score, deviation, data))
        if n % 9 == 0:
            greys.append(grey)
    scores, deviations = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    if len(sys.argv) > 2:
        folder = Path(sys.argv[2])
        folder.mkdir(parents=True, exist_ok=True)
        for name, values, steps in (("sharpness", scores, SHARPNESS), ("blank", deviations, BLANK)):
            for low, high in pairwise(steps):
                chosen = np.flatnonzero((values >= low) & (values < high))
                drawn = np.random.default_rng(0).permutation(chosen)
                sheet(folder / f"{name}-{low}-{high}.png", [rows[i][2] for i in drawn])
    print(
        json.dumps(
            {
                "benchmark": "filters",
                "images": len(rows),
                "sharpness_below": {str(t): int((scores < t).sum()) for t in SHARPNESS[1:]},
                "sharpness_quantiles": {q: round(float(np.quantile(scores, q)), 3) for q in (0.01, 0.05, 0.5, 0.95)},
                "thumbnail_deviation_below": {str(t): int((deviations < t).sum()) for t in BLANK[1:]},
                "ms_per_image": {
                    "decode": round(1000 * decoding / len(rows), 3),
                    "luminance and sharpness": round(1000 * measuring / len(rows), 3),
                },
                "measures": compared(greys),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
