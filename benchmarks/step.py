"""One training step of ViT-S/14 on one CPU thread: how much of the processor's matrix product it uses.

    python benchmarks/step.py [STEPS]

Batch 8, 2 x 98 and 8 x 42 pixels, 4,096 untied prototypes, Sinkhorn-Knopp; forward, backward, clipping, AdamW and the teacher.
Time is that of the thread on a core; the work is the products that PyTorch counts and those of fused attention (fp32), which it does not
count on CPUs; the yardstick is a product of 2,048 x 2,048 matrices of the same run. Both are interleaved; medians after WARM_UP steps, until
the process no longer asks for fresh memory (a page costs 12 us on a virtual machine).
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lodeset.training.config import TrainingConfig
from lodeset.training.data import Batch
from lodeset.training.masking import block_mask, mask_counts
from lodeset.training.objectives.dinov2 import losses
from lodeset.training.schedules import StepValues, step_values
from lodeset.training.ssl import StepLosses, clip_gradients, fresh, make_optimiser, schedule, update_teacher

WARM_UP = 6
BATCH, GLOBAL, LOCAL, LOCALS, PATCH = 8, 98, 42, 8, 14


def config_of(drop_path: float, precision: str, steps: int = 1000, seed: int = 0) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "steps": steps,
            "seed": seed,
            "batch": BATCH,
            "precision": precision,
            "model": {
                "patch_size": PATCH,
                "dim": 384,
                "depth": 12,
                "heads": 6,
                "layerscale": 1e-5,
                "drop_path": drop_path,
            },
            "crops": {"global_size": GLOBAL, "local_size": LOCAL, "local_count": LOCALS},
            "heads": {
                "prototypes": 4096,
                "hidden": 2048,
                "dino_bottleneck": 256,
                "ibot_bottleneck": 256,
                "tied": False,
            },
        }
    )


def batch_of(config: TrainingConfig, step: int) -> Batch:
    rng = np.random.default_rng(step)
    side = GLOBAL // PATCH
    counts = mask_counts(rng, 2 * BATCH, side * side, config.masking)
    masks = torch.from_numpy(np.stack([block_mask(rng, side, side, int(count)) for count in counts]))
    generator = torch.Generator().manual_seed(step)
    return Batch(
        step=step,
        image_ids=tuple(f"{n:032x}" for n in range(BATCH)),
        global_crops=torch.randint(256, (2 * BATCH, 3, GLOBAL, GLOBAL), generator=generator, dtype=torch.uint8),
        local_crops=torch.randint(256, (LOCALS * BATCH, 3, LOCAL, LOCAL), generator=generator, dtype=torch.uint8),
        masks=masks,
        skipped=(),
    )


def product(dtype: torch.dtype) -> float:
    """GFLOP/s."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    started = time.thread_time()
    torch.mm(a, b)
    return 2 * 2048**3 / (time.thread_time() - started) / 1e9


def attention_gflop(config: TrainingConfig) -> float:
    """The products of attention: 2 forward and 4 backward in the student, for the crops it keeps, and 2 in the teacher."""
    model = config.model
    groups = ((2 * BATCH, (GLOBAL // PATCH) ** 2 + 1), (LOCALS * BATCH, (LOCAL // PATCH) ** 2 + 1))

    def product_of(crops: int, tokens: int) -> float:
        return 2 * crops * tokens**2 * model.dim / 1e9

    student = sum(6 * product_of(max(1, int(crops * (1 - model.drop_path))), tokens) for crops, tokens in groups)
    return model.depth * (student + 2 * product_of(*groups[0]))


class Run:
    """A student, its teacher and optimiser, stepping."""

    def __init__(self, drop_path: float, precision: str, steps: int = 1000, seed: int = 0) -> None:
        self.config = config_of(drop_path, precision, steps, seed)
        self.nets = fresh(self.config)
        self.optimiser = make_optimiser(self.nets.student, self.config.optimiser)

    def step(self, number: int) -> None:
        self.learn(batch_of(self.config, number), step_values(self.config, 100))

    def learn(self, batch: Batch, values: StepValues) -> StepLosses:
        schedule(self.optimiser, values)
        seen = losses(self.nets, batch, values, self.config, None)
        self.optimiser.zero_grad()
        torch.autograd.backward(seen.total)
        clip_gradients(self.nets.student, self.config.optimiser.clip_norm)
        self.optimiser.step()
        update_teacher(self.nets.student, self.nets.average, values.momentum)
        return seen


def main() -> None:
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for drop_path in (0.3, 0.0):
            run = Run(drop_path, precision)
            with FlopCounterMode(display=False) as counter:
                run.step(0)
            fused = attention_gflop(run.config) if precision == "fp32" else 0.0
            work = counter.get_total_flops() / 1e9 + fused
            for number in range(1, WARM_UP):
                run.step(number)
            seconds, rates = [], []
            for number in range(WARM_UP, WARM_UP + steps):
                rates.append(product(dtype))
                started = time.thread_time()
                run.step(number)
                seconds.append(time.thread_time() - started)
            rate, median = statistics.median(rates), statistics.median(seconds)
            print(
                json.dumps(
                    {
                        "precision": precision,
                        "drop_path": drop_path,
                        "seconds": round(median, 3),
                        "gflop": round(work, 1),
                        "product_gflops": round(rate, 1),
                        "utilisation": round(work / median / rate, 3),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
