"""Fits what ships as pipeline/algorithms/closeup.npz: the networks that tell copies from strangers on full images.

    python benchmarks/fit_closeups.py POOL.tar [COPIES] [OUT.npz]

No label is read. Images of the pool and simple drawings are copied as in `fit_copies.py`, every other one also as a strong
crop, at any angle or inside another picture. A copy and its original are a positive pair; a copy and any other image that looks
like it in some view is a negative one, unless that image is itself a copy of the original, as far as the round before can tell.
Photographs of one scene are meant to be strangers: nothing that is displaced passes for a copy in the pool.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import sys
import tarfile
import time
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch
from fit_copies import DRAWN, PROCESSES, drawn, fitted, gathered, thumbnail
from PIL import Image

from lodeset.pipeline.algorithms.copies import closeup, evidence, keypoints, shipped
from lodeset.pipeline.algorithms.copies.closeup import FEATURES, LEAST_SIDE
from lodeset.pipeline.algorithms.copies.keypoints import Described
from lodeset.pipeline.algorithms.copies.variations import varied
from lodeset.pipeline.algorithms.images.decoding import decode

ROUNDS = 2
# Candidate pairs that thumbnails already tell apart are not looked at.
WORTH = -8.0
# Pairs of the pool that agree so and are not displaced may be copies: before there is a network to ask.
SUSPECT = {"robust_detail_correlation": 0.9, "agreeing_tiles": 0.7}
STILL = 0.35  # pixels
# A copy that agrees less is one that was aligned wrongly, which says nothing of copies.
LOST = {"robust_detail_correlation": 0.5, "agreeing_tiles": 0.3}

Files = list[bytes]
files: Files = []  # of pool, drawings and copies; workers are forks


def strong(image: Image.Image, other: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A crop to 10 to 40 % of the area, a turn by any angle, or a picture inside another one."""
    kind = rng.integers(3)
    if kind == 0:
        share, ratio = rng.uniform(0.1, 0.4), math.exp(rng.uniform(-0.3, 0.3))
        width = min(image.width, max(16, round(image.width * math.sqrt(share * ratio))))
        height = min(image.height, max(16, round(image.height * math.sqrt(share / ratio))))
        left, top = int(rng.integers(0, image.width - width + 1)), int(rng.integers(0, image.height - height + 1))
        return image.crop((left, top, left + width, top + height))
    if kind == 1:
        grey = int(rng.choice([0, 128, 255]))
        return image.rotate(
            float(rng.uniform(10, 350)), Image.Resampling.BICUBIC, expand=bool(rng.integers(2)), fillcolor=(grey,) * 3
        )
    scale = rng.uniform(1.3, 2.2)
    page = other.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    page.paste(
        image,
        (int(rng.integers(0, page.width - image.width + 1)), int(rng.integers(0, page.height - image.height + 1))),
    )
    return page


def copied(job: tuple[int, int, bool]) -> bytes:
    row, other, far = job
    rng = np.random.default_rng([3, row])
    image = decode(files[row])
    if far:
        image = strong(image, decode(files[other]), rng)
    if not far or rng.random() < 0.5:
        image, _ = varied(image, rng)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def looked_at(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of the pairs [P, 2] that key points can align, and which these are."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    held: dict[int, Described] = {}
    overlaps, rows = [], []
    for at, (a, b) in enumerate(pairs):
        for row in (a, b):
            if row not in held:
                held[row] = keypoints.described(decode(files[row]))
        found = keypoints.aligned(held[a], held[b])
        common = closeup.overlap(held[a], held[b], found) if found else None
        if common:
            overlaps.append(common)
            rows.append(at)
    features = [closeup.measured(overlaps[at : at + 256]) for at in range(0, len(overlaps), 256)]
    return np.concatenate(features or [closeup.measured([])]), np.array(rows, np.int64)


def main(pool_tar: str, count: int = 5_000, out: str = str(shipped.CLOSEUP)) -> None:
    started = time.time()
    with tarfile.open(pool_tar) as tar:
        files.extend(tar.extractfile(m).read() for m in tar if m.isfile())
    fork = multiprocessing.get_context("fork")
    with fork.Pool(PROCESSES) as pool:
        files.extend(pool.map(drawn, range(DRAWN), chunksize=16))
        readable = [t is not None for t in pool.map(thumbnail, files, chunksize=64)]
    files[:] = [data for data, good in zip(files, readable, strict=True) if good]
    images, first_drawn = len(files), len(files) - DRAWN
    rng = np.random.default_rng(0)
    usable = [row for row, data in enumerate(files) if min(Image.open(io.BytesIO(data)).size) >= LEAST_SIDE]
    originals = np.sort(rng.choice(usable, min(count, len(usable)), replace=False))
    jobs = [(int(row), int(rng.choice(usable)), at % 2 == 1) for at, row in enumerate(originals)]
    with fork.Pool(PROCESSES) as pool:
        files.extend(pool.map(copied, jobs, chunksize=16))
    with fork.Pool(PROCESSES) as pool:
        thumbnails = np.stack(pool.map(thumbnail, files, chunksize=64))
    print(f"{images} images, {len(originals)} copies, {time.time() - started:.0f} s", flush=True)

    pairs, thumbnail_features = gathered(thumbnails, evidence.model().whitening)
    by_score = evidence.model().score(thumbnail_features)
    worth, by_thumbnail = by_score > WORTH, by_score > 0
    low, high = np.minimum(pairs.a, pairs.b), np.maximum(pairs.a, pairs.b)
    alike = low[by_thumbnail] * len(files) + high[by_thumbnail]
    low, high = low[worth], high[worth]
    own = np.stack([originals, images + np.arange(len(originals))], axis=1)
    asked = np.unique(np.concatenate([np.stack([low, high], axis=1), own]), axis=0)
    with fork.Pool(PROCESSES) as pool:
        parts = pool.map(looked_at, np.array_split(asked, 64), chunksize=1)
    offsets = np.cumsum([0, *(len(x) for x in np.array_split(asked, 64))])
    features = np.concatenate([f for f, _ in parts])
    low, high = asked[np.concatenate([rows + at for (_, rows), at in zip(parts, offsets, strict=False)])].T
    print(f"{len(asked)} pairs looked at, {len(low)} aligned, {time.time() - started:.0f} s", flush=True)

    in_pool, of_copy = high < images, (high >= images) & (low < images)
    original = originals[np.maximum(high - images, 0)]
    positive = of_copy & (low == original)
    strange = in_pool & (low >= first_drawn)  # drawings are known to be no copies of each other
    columns = dict(zip(FEATURES, features.T, strict=True))
    lost = positive & np.logical_and.reduce([columns[name] < limit for name, limit in LOST.items()])
    still = in_pool & (columns["displacement"] < STILL)
    copies = still & np.isin(low * len(files) + high, alike)
    copies |= still & np.logical_and.reduce([columns[name] > limit for name, limit in SUSPECT.items()])
    known = np.minimum(low, original) * images + np.maximum(low, original)
    for _ in range(ROUNDS):
        unsure = of_copy & ~positive & (original < first_drawn) & np.isin(known, (low * images + high)[copies])
        used = ((of_copy & ~unsure) | strange) & ~lost
        fit = fitted(features[used], positive[used])
        score = fit.score(features)
        copies |= still & (score > 0)
        strangers = used & ~positive
        print(
            f"{used.sum()} pairs, {(used & positive).sum()} copies, {unsure.sum()} unsure; quantiles of copies "
            f"{np.quantile(score[used & positive], [0.02, 0.05, 0.1, 0.25, 0.5]).round(1)}, strangers above 0, 2, 4: "
            f"{[int((score[strangers] > x).sum()) for x in (0, 2, 4)]}, {time.time() - started:.0f} s",
            flush=True,
        )
    np.savez_compressed(out, **asdict(fit))
    print(f"{out}: {Path(out).stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1], *(int(x) for x in sys.argv[2:3]), *sys.argv[3:4])
