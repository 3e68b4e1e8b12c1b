"""How much faster models are for what was removed of them, one thread, taking turns in one run.

    OMP_NUM_THREADS=1 python benchmarks/prune_speed.py DENSE PRUNED [PRUNED ...]

Folders of models that take images of one size (see `pruning.saving.load_model`). Per batch size the median milliseconds of a forward pass
with half the interquartile range, and the dense model's median over it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lodeset.pruning.formats.saving import load_model
from lodeset.pruning.jobs.cost import count_macs, latencies_ms
from lodeset.training.vit import DinoVisionTransformer

ROUNDS = {1: 301, 32: 101}


def main() -> None:
    models = {Path(folder).name: load_model(Path(folder)) for folder in sys.argv[1:]}
    dense, *_ = models.values()
    side = dense.image_size if isinstance(dense, DinoVisionTransformer) else 32
    example = torch.zeros(2, 3, side, side)
    macs = count_macs(dense, example)
    print("batch  MACs removed  ms  times as fast  model")
    for batch, rounds in ROUNDS.items():
        found = latencies_ms(models, example, batch, rounds)
        first, *_ = found.values()
        for name, model in models.items():
            took = found[name]
            ms = f"{took['median']:.2f} ± {took['spread'] / 2:.2f}"
            removed = 1 - count_macs(model, example) / macs
            print(f"{batch:5}  {removed:6.1%}  {ms}  {first['median'] / took['median']:.2f}  {name}", flush=True)


if __name__ == "__main__":
    main()
