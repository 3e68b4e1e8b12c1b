"""Fits what ships as pipeline/algorithms/copies/details.npz: the networks that tell copies from template-mates by their details.

    python benchmarks/fit_details.py [--images N] [--out OUT.npz] FOLDER...

Each FOLDER holds the images of one domain (documents, screens, charts, ...), in folders or named so that images of one template come
one after the other. Images are known to be no copies of each other, unless their pixels are the same. Each is copied three times
(`algorithms.copies.variations`, and one strong change of `fit_closeups.py`). A copy and its original are a positive pair; two images
of one domain that look alike, or one and a copy of the other, or an image and what `edited` makes of it, are a negative one. Pairs are
aligned as dedup does it.

First every domain is judged by networks that were fitted on the others; the table says how many copies stay at the default line,
and how many mates pass for copies, beside what close looks say without details.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import torch
from fit_closeups import strong
from fit_copies import PROCESSES, fitted
from PIL import Image

from lodeset.pipeline.algorithms.copies import closeup, details, keypoints, shipped
from lodeset.pipeline.algorithms.copies.variations import varied
from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode

LINE = 0.5  # `dedup.min_detail_score`
LEAST_SIDE, LONGEST, LEAST_DEVIATION = 64, 1_200, 5.0
EQUAL, SAME_PIXELS = (
    0.9995,
    0.3,
)  # correlation of thumbnails, and mean difference of the luminance of two files of one picture
ALIKE, NEAREST = 0.3, 6  # correlation of thumbnails, and neighbors of each image, of negative pairs
MIXED = 0.35  # share of the nearest neighbors of which a copy makes another negative pair
SPREAD = 16  # images that are taken one after the other, so that there are mates


@dataclass(frozen=True)
class Picture:
    domain: str
    data: bytes
    original: int  # its number; that of a copy's original; -1 - that of what was edited


pictures: list[Picture] = []  # workers are forks


def thumbnail(data: bytes) -> np.ndarray:
    small = Image.open(io.BytesIO(data)).convert("L").resize((32, 32), Image.Resampling.BOX)
    rows = np.asarray(small, np.float32).reshape(-1)
    rows = rows - rows.mean()
    return rows / max(float(np.linalg.norm(rows)), 1e-3)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def read(path: Path) -> bytes | None:
    try:
        image = decode(path.read_bytes())
    except (Unreadable, OSError):
        return None
    image.thumbnail((LONGEST, LONGEST))
    flat = float(np.asarray(image.convert("L")).std()) < LEAST_DEVIATION
    return None if min(image.size) < LEAST_SIDE or flat else encoded(image)


def images_of(folder: Path, wanted: int, rng: np.random.Generator) -> list[bytes]:
    """Runs of images that lie together; of files that show the same pixels, one."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
    starts = np.arange(0, len(paths), SPREAD)
    chosen = [path for start in rng.permutation(starts).tolist() for path in paths[start : start + SPREAD]]
    found: list[bytes] = []
    small: list[np.ndarray] = []
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        for data in pool.imap(read, chosen, chunksize=16):
            if data is None:
                continue
            own = thumbnail(data)
            if not any(float(own @ one) > EQUAL and same(data, other) for one, other in zip(small, found, strict=True)):
                found.append(data)
                small.append(own)
            if len(found) == wanted:
                break
    return found


def same(one: bytes, other: bytes) -> bool:
    first, second = (np.asarray(Image.open(io.BytesIO(data)).convert("L"), np.int16) for data in (one, other))
    return first.shape == second.shape and float(np.abs(first - second).mean()) < SAME_PIXELS


def copies(number: int) -> list[bytes]:
    rng = np.random.default_rng([7, number])
    image, made = decode(pictures[number].data), []
    for far in (False, False, True):
        copy = strong(image, decode(pictures[int(rng.integers(len(pictures)))].data), rng) if far else image
        if not far or rng.random() < 0.5:
            copy, _ = varied(copy, rng)
        if min(copy.size) >= 24:
            made.append(encoded(copy))
    return made


def edited(image: Image.Image, rng: np.random.Generator) -> Image.Image | None:
    """Another document of the same template: small rectangles of content, such as words, change places. None if there are too few."""
    pixels = np.asarray(image).copy()
    height, width = pixels.shape[:2]
    across, along = (
        max(8, round(side * rng.uniform(low, high))) for side, low, high in ((width, 0.05, 0.2), (height, 0.02, 0.05))
    )
    rows, columns = height // along, width // across
    cells = [(y * along, x * across) for y in range(rows) for x in range(columns)]
    textured = [(y, x) for y, x in cells if pixels[y : y + along, x : x + across].std() > 12]
    wanted = 2 * int(rng.integers(3, 24))
    if len(textured) < 8:
        return None
    chosen = [textured[n] for n in rng.permutation(len(textured))[: min(wanted, len(textured)) // 2 * 2]]
    for (y, x), (v, u) in zip(chosen[::2], chosen[1::2], strict=True):
        one, other = pixels[y : y + along, x : x + across].copy(), pixels[v : v + along, u : u + across].copy()
        pixels[y : y + along, x : x + across], pixels[v : v + along, u : u + across] = other, one
    return Image.fromarray(pixels)


def mates_of(number: int) -> list[bytes]:
    """Edited images of one, half of them changed further."""
    rng, made = np.random.default_rng([8, number]), []
    for far in (False, True):
        mate = edited(decode(pictures[number].data), rng)
        if mate is not None:
            made.append(encoded(varied(mate, rng)[0] if far else mate))
    return made


def looked_at(pairs: Sequence[tuple[int, int]]) -> list[tuple[np.ndarray | None, float]]:
    """Of each pair its features, and what a close look without details says; NaN where it says nothing."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    held: dict[int, tuple[keypoints.Described, details.Drawing]] = {}
    found: list[tuple[np.ndarray | None, float]] = []
    for pair in pairs:
        for number in pair:
            if number not in held:
                image = decode(pictures[number].data)
                held[number] = keypoints.described(image), details.drawing(image)
        (first, drawn_first), (second, drawn_second) = (held[number] for number in pair)
        aligned = keypoints.aligned(first, second)
        common = closeup.overlap(first, second, aligned) if aligned else None
        said = float(closeup.score(closeup.measured([common]))[0]) if common else float("nan")
        unit = (
            closeup.between(first, second, aligned)
            if aligned and common
            else details.upright(drawn_first, drawn_second)
        )
        found.append((None if unit is None else details.measured(drawn_first, drawn_second, unit), said))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--out", type=Path, default=shipped.DETAILS)
    parser.add_argument("--features", type=Path, help="where to keep what was fitted on")
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    for folder in asked.folders:
        for data in images_of(folder, asked.images, rng):
            pictures.append(Picture(folder.name, data, len(pictures)))
    count = len(pictures)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(PROCESSES) as pool:
        for number, made in enumerate(pool.map(copies, range(count), chunksize=8)):
            pictures.extend(Picture(pictures[number].domain, data, number) for data in made)
        thumbnails = np.stack(pool.map(thumbnail, [one.data for one in pictures[:count]], chunksize=32))
        last = len(pictures)
        for number, made in enumerate(pool.map(mates_of, range(count), chunksize=8)):
            pictures.extend(Picture(pictures[number].domain, data, -1 - number) for data in made)
    domains = np.array([one.domain for one in pictures[:count]])
    alike = thumbnails @ thumbnails.T
    alike[domains[:, None] != domains[None]] = -1
    np.fill_diagonal(alike, -1)
    near = np.argsort(-alike, axis=1)[:, :NEAREST]
    mates = {(min(i, j), max(i, j)) for i in range(count) for j in near[i].tolist() if alike[i, j] > ALIKE}
    of_copies = [(one.original, count + at) for at, one in enumerate(pictures[count:last])]
    of_mates = [(-1 - one.original, last + at) for at, one in enumerate(pictures[last:])]
    mixed = [
        (int(near[original, 0]), copy)
        for original, copy in of_copies
        if alike[original, near[original, 0]] > ALIKE and rng.random() < MIXED
    ]
    pairs = sorted([*of_copies, *of_mates, *mates, *mixed])
    with fork.Pool(PROCESSES) as pool:  # anew: these forks know the copies
        chunks = [pairs[at : at + 48] for at in range(0, len(pairs), 48)]
        found = [one for some in pool.imap(looked_at, chunks) for one in some]
    there = [at for at, (features, _) in enumerate(found) if features is not None]
    features = np.stack([found[at][0] for at in there])  # type: ignore[arg-type]
    close = np.array([found[at][1] for at in there])
    positive = np.array([pictures[pairs[at][0]].original == pictures[pairs[at][1]].original for at in there])
    of_domain = np.array([pictures[pairs[at][0]].domain for at in there])
    print(f"{count} images, {len(pairs)} pairs, {len(there)} aligned, {int(positive.sum())} of them copies", flush=True)
    print("| domain | copies | mates | copies kept | mates taken | mates taken without details |")
    print("| --- | --- | --- | --- | --- | --- |")
    for domain in dict.fromkeys(of_domain.tolist()):
        own = of_domain == domain
        said = fitted(features[~own], positive[~own]).score(features[own])
        yes, before = said >= LINE, np.isnan(close[own]) | (close[own] >= 0)
        mates_own = ~positive[own]
        print(
            f"| {domain} | {int((~mates_own).sum())} | {int(mates_own.sum())} | {yes[~mates_own].mean():.3f} "
            f"| {int(yes[mates_own].sum())} | {int(before[mates_own].sum())} |",
            flush=True,
        )
    np.savez(asked.out, **asdict(fitted(features, positive)))
    if asked.features is not None:
        np.savez(asked.features, features=features, positive=positive, domain=of_domain)


if __name__ == "__main__":
    main()
