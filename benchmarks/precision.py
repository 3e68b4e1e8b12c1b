"""Does bf16 learn what fp32 learns? The step of `step.py` on crops of photographs, 200 steps, both precisions from the same start.

    python benchmarks/precision.py POOL.tar [SEEDS]

Prints each loss term's mean over steps 150 to 200 by seed, and bf16 over fp32. The precisions and seeds run two at a time, one thread each.
"""

from __future__ import annotations

import json
import multiprocessing
import sys

import cv2
import numpy as np
import torch
from loader import LIMIT, photographs
from step import BATCH, GLOBAL, PATCH, Run

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.training.augment import augment
from lodeset.training.data import Batch, view_major
from lodeset.training.masking import block_mask, mask_counts
from lodeset.training.schedules import step_values

STEPS, MEASURED, PHOTOGRAPHS, DROP_PATH = 200, 150, 400, 0.3


def learn(path: str, precision: str, seed: int) -> dict[str, float]:
    """The mean of each term over the last steps."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    run = Run(DROP_PATH, precision, steps=STEPS, seed=seed)
    images = [np.asarray(decode(data, LIMIT)) for data in photographs(path, PHOTOGRAPHS)]
    seen: dict[str, list[float]] = {}
    for step in range(STEPS):
        rng = np.random.default_rng((seed, step))
        rows = rng.choice(len(images), BATCH, replace=False)
        crops = [augment(images[row], rng, run.config.crops) for row in rows]
        side = GLOBAL // PATCH
        counts = mask_counts(rng, 2 * BATCH, side * side, run.config.masking)
        batch = Batch(
            step=step,
            image_ids=tuple(map(str, rows)),
            global_crops=view_major([one.global_views for one in crops]),
            local_crops=view_major([one.local_views for one in crops]),
            masks=torch.from_numpy(np.stack([block_mask(rng, side, side, int(count)) for count in counts])),
            skipped=(),
        )
        torch.manual_seed(seed * STEPS + step)  # stochastic depth
        told = run.learn(batch, step_values(run.config, step))
        if step >= MEASURED:
            for name, term in told.terms.items():
                seen.setdefault(name, []).append(float(term.detach()))
    return {name: float(np.mean(some)) for name, some in seen.items()}


def main() -> None:
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    jobs = [(sys.argv[1], precision, seed) for seed in range(seeds) for precision in ("fp32", "bf16")]
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as two:
        found = two.starmap(learn, jobs, chunksize=1)
    for seed in range(seeds):
        fp32, bf16 = found[2 * seed], found[2 * seed + 1]
        ratio = {name: round(bf16[name] / fp32[name], 4) for name in fp32}
        print(json.dumps({"seed": seed, "fp32": fp32, "bf16": bf16, "bf16 / fp32": ratio}), flush=True)


if __name__ == "__main__":
    main()
