"""LeNet (20-50-500 units) on MNIST: what pruning without fine-tuning and without labels costs.

    python benchmarks/lenet.py MNIST.npz [SEEDS]

MNIST.npz: x_train, y_train, x_test, y_test. For each seed a network is trained, moments are measured once on 10,000 training images, and the
weakest of 48 penalties is taken that removes 90, 95 and 98 % of the parameters. Every method keeps as many units in every layer. Two
seeds at a time, one thread each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lodeset.pruning.choosing.criteria import METHODS
from lodeset.pruning.choosing.entropic import path
from lodeset.pruning.choosing.variants import layers_of, variant
from lodeset.pruning.config import PruneJob
from lodeset.pruning.units.activations import collect_grams
from lodeset.pruning.units.groups import find_groups
from lodeset.pruning.units.removal import apply

TARGETS = (0.9, 0.95, 0.98)
EPOCHS, BATCH = 8, 128
CALIBRATION, POSITIONS = 10_000, 8
STRENGTHS = tuple(float(eps) for eps in np.geomspace(2e-3, 0.2, 48))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        out: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return out


def trained(x: Tensor, y: Tensor, seed: int) -> LeNet:
    torch.manual_seed(seed)
    model = LeNet()
    steps = EPOCHS * (len(x) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(x) // BATCH) == 0:
            order = torch.randperm(len(x)).split(BATCH)
        rows = order[step % (len(x) // BATCH)]
        optimiser.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(np.mean(torch.cat([model(part) for part in x.split(500)]).argmax(1).eq(y).numpy()))


def one_seed(file: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with np.load(file) as data:
        x, x_test = (
            ((torch.from_numpy(data[k]).float() / 255) - 0.1307)[:, None] / 0.3081 for k in ("x_train", "x_test")
        )
        y, y_test = (torch.from_numpy(data[k]).long() for k in ("y_train", "y_test"))
    model, example = trained(x, y, seed), x[:2]
    size = sum(p.numel() for p in model.parameters())
    groups = find_groups(model, example).prunable
    started = time.thread_time()
    grams = collect_grams(model, groups, x[:CALIBRATION].split(250), positions_per_image=POSITIONS, seed=seed)
    layers = {group.name: layers_of(group, grams) for group in groups}
    measured = time.thread_time() - started

    job = PruneJob(sweep=STRENGTHS, seed=seed)
    started = time.thread_time()
    solved = {group.name: path(layers[group.name], group.units, job) for group in groups}
    found: dict[str, Any] = {
        "dense": accuracy(model, x_test, y_test),
        "moments_s": round(measured, 1),
        "sweep_s": round(time.thread_time() - started, 1),
    }

    def at(eps: float, method: str) -> tuple[float, float, list[int]]:
        chosen = variant(model, groups, grams, job, method, {name: by_eps[eps] for name, by_eps in solved.items()})
        pruned, _ = apply(model, groups, chosen.layers, example)
        left = sum(p.numel() for p in pruned.parameters())
        return 1 - left / size, accuracy(pruned, x_test, y_test), [len(new.keep) for new in chosen.layers.values()]

    curve = [(eps, *at(eps, "entropic+refit")) for eps in STRENGTHS]
    for target in TARGETS:
        eps = next(eps for eps, removed, _, _ in curve if removed >= target)
        told = {method: at(eps, method) for method in METHODS}
        removed, _, units = told["entropic"]
        scores = {method: score for method, (_, score, _) in told.items()}
        found[str(target)] = {"eps_w": eps, "removed": removed, "units": units, "accuracy": scores}
        print(json.dumps({"seed": seed, "dense": found["dense"], "target": target, **found[str(target)]}), flush=True)
    return found


def main() -> None:
    file, seeds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(2) as two:
        found = two.starmap(one_seed, [(file, seed) for seed in range(seeds)], chunksize=1)
    dense = np.array([one["dense"] for one in found])
    print(f"dense {100 * dense.mean():.2f} +- {100 * dense.std(ddof=1):.2f} %")
    print(f"moments {found[0]['moments_s']} s, {len(STRENGTHS)} strengths {found[0]['sweep_s']} s")
    for target in TARGETS:
        at = [one[str(target)] for one in found]
        print(f"{100 * np.mean([one['removed'] for one in at]):.2f} % removed, units {[one['units'] for one in at]}")
        for method in METHODS:
            lost = 100 * (dense - np.array([one["accuracy"][method] for one in at]))
            print(f"  {method:<16} {lost.mean():6.2f} +- {lost.std(ddof=1):.2f} points lost")


if __name__ == "__main__":
    main()
