"""Fits what ships as pipeline/algorithms/copies.npz: the whitening and the networks that tell copies from strangers.

    python benchmarks/fit_copies.py POOL.tar [COPIES] [OUT.npz]

No label is read. Simple drawings join the pool, since discs and stripes can be aligned with each other almost perfectly and
are no copies. A sample of it all is copied in the ways of `algorithms.copies.variations`; pool and copies are searched and
aligned as dedup does it; a copy and its original are a positive pair, a copy and anything else a negative one. The pool
has duplicates of its own: a negative pair whose pool image is itself found to be a copy of the original is left out, by an
agreement of thumbnails at first and by the networks of the round before afterwards.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import sys
import tarfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from drawings import CONCEPTS, draw
from PIL import Image

from lodeset.pipeline.algorithms.copies import evidence, shipped, views
from lodeset.pipeline.algorithms.copies.evidence import FEATURES
from lodeset.pipeline.algorithms.copies.scorer import Scorer
from lodeset.pipeline.algorithms.copies.variations import varied
from lodeset.pipeline.algorithms.hardware import has_bf16
from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode, examine

DIMENSIONS, HIDDEN, NETWORKS, ROUNDS, EPOCHS, BATCH = 64, 32, 4, 2, 30, 512
# A pool pair that agrees as much as this may be a copy: before there is a network to ask.
SUSPECT = {"detail_correlation": 0.5, "half_tile": 0.8, "whitened_similarity": 0.75}
DRAWN = 3_000
PROCESSES = 2


def thumbnail(data: bytes) -> np.ndarray | None:
    try:
        return np.frombuffer(examine(data, 100_000_000).thumbnail, np.uint8)
    except Unreadable:
        return None


def drawn(seed: int) -> bytes:
    rng = np.random.default_rng([1, seed])
    concept = sorted(CONCEPTS)[seed % len(CONCEPTS)]
    buffer = io.BytesIO()
    Image.fromarray(draw(concept, rng, int(rng.integers(96, 257)), int(rng.integers(96, 257)))).save(buffer, "PNG")
    return buffer.getvalue()


def copied(job: tuple[int, bytes]) -> np.ndarray | None:
    row, data = job
    made, _ = varied(decode(data), np.random.default_rng(row))
    buffer = io.BytesIO()
    made.save(buffer, "PNG")
    return thumbnail(buffer.getvalue())


def gathered(thumbnails: np.ndarray, whitening: np.ndarray) -> tuple[views.Candidates, np.ndarray]:
    """Candidate pairs as dedup finds them, and all their features."""
    jobs = list(itertools.pairwise(np.linspace(0, len(thumbnails), 17).astype(int)))
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        found = views.joined(pool.map(partial(_searched, thumbnails, whitening), jobs, chunksize=1))
        pairs = views.standing_out(found, len(thumbnails))
        rows = [pairs[cut] for cut in np.array_split(np.arange(len(pairs.a)), 32)]
        parts = pool.map(partial(_measured, thumbnails, whitening), rows, chunksize=1)
    return pairs, evidence.with_candidates(np.concatenate(parts), pairs)


def _searched(thumbnails: np.ndarray, whitening: np.ndarray, job: tuple[int, int]) -> views.Found:
    torch.set_num_threads(1)
    return views.ViewIndex(thumbnails, whitening, has_bf16()).search(thumbnails, *job, same=True)


def _measured(thumbnails: np.ndarray, whitening: np.ndarray, pairs: views.Candidates) -> np.ndarray:
    torch.set_num_threads(1)
    return evidence.measured(thumbnails, pairs.a, pairs.b, views.starts()[pairs.view], whitening)[0]


def fitted(features: np.ndarray, copies: np.ndarray) -> Scorer:
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    inputs = torch.from_numpy(((features - mean) / deviation).clip(-4, 4).astype(np.float32))
    wanted = torch.from_numpy(copies.astype(np.float32))
    layers: tuple[list[np.ndarray], ...] = ([], [], [])
    for seed in range(NETWORKS):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(features.shape[1], HIDDEN),
            torch.nn.SiLU(),
            torch.nn.Linear(HIDDEN, HIDDEN),
            torch.nn.SiLU(),
            torch.nn.Linear(HIDDEN, 1),
        )
        steps = EPOCHS * -(-len(inputs) // BATCH)
        optimiser = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(inputs)).split(BATCH):
                noisy = inputs[rows] + 0.05 * torch.randn(len(rows), features.shape[1])
                loss = torch.nn.functional.binary_cross_entropy_with_logits(network(noisy)[:, 0], wanted[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        for kept, layer in zip(layers, network[::2], strict=True):
            kept.append(torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().numpy())
    return Scorer(mean.astype(np.float32), deviation.astype(np.float32), *(np.stack(x) for x in layers))


def main(pool_tar: str, count: int = 4_000, out: str = str(shipped.EVIDENCE)) -> None:
    started = time.time()
    with tarfile.open(pool_tar) as tar:
        files = [tar.extractfile(m).read() for m in tar if m.isfile()]
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        files += pool.map(drawn, range(DRAWN), chunksize=16)
        read = [
            (data, t) for data, t in zip(files, pool.map(thumbnail, files, chunksize=64), strict=True) if t is not None
        ]
        originals = np.sort(np.random.default_rng(0).choice(len(read), min(count, len(read)), replace=False))
        made = pool.map(copied, [(int(row), read[row][0]) for row in originals], chunksize=16)
    images, first_drawn = len(read), len(read) - DRAWN
    thumbnails = np.stack([t for _, t in read] + [m for m in made if m is not None])
    source = np.array([row for row, m in zip(originals, made, strict=True) if m is not None])
    whitening = views.whitening(thumbnails[:first_drawn], DIMENSIONS)
    print(f"{images} images, {len(source)} copies, {time.time() - started:.0f} s", flush=True)
    pairs, features = gathered(thumbnails, whitening)
    low, high = np.minimum(pairs.a, pairs.b), np.maximum(pairs.a, pairs.b)
    in_pool = high < images
    of_copy = (high >= images) & (low < images)
    original = source[np.maximum(high - images, 0)]
    positive = of_copy & (low == original)
    # Drawings are known to be no copies of each other.
    strange = in_pool & (low >= first_drawn)
    print(
        f"{len(low)} candidates, {positive.sum()} of the copies among them, {time.time() - started:.0f} s", flush=True
    )

    columns = {name: features[:, FEATURES.index(name)] for name in SUSPECT}
    copies = in_pool & np.logical_or.reduce([columns[name] > limit for name, limit in SUSPECT.items()])
    known = np.minimum(low, original) * images + np.maximum(low, original)
    for _ in range(ROUNDS):
        unsure = of_copy & ~positive & (original < first_drawn) & np.isin(known, (low * images + high)[copies])
        used = (of_copy & ~unsure) | strange
        fit = fitted(features[used], positive[used])
        score = fit.score(features)
        copies = in_pool & (score > 0)
        strangers = used & ~positive
        print(
            f"{used.sum()} pairs, {unsure.sum()} unsure; of strangers score > 0: {(score[strangers] > 0).sum()}, "
            f"quantiles of copies {np.quantile(score[positive], [0.05, 0.1, 0.25, 0.5]).round(1)}, "
            f"largest of strangers {np.sort(score[strangers])[-12:].round(1)}, {time.time() - started:.0f} s",
            flush=True,
        )
    np.savez_compressed(out, whitening=whitening, **asdict(fit))
    print(f"{out}: {Path(out).stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1], *(int(x) for x in sys.argv[2:3]), *sys.argv[3:4])
