"""ResNet18 and VGG-16 on CIFAR-10: what pruning without fine-tuning and without labels costs.

    python benchmarks/convnets.py resnet18|vgg16 TRAIN.parquet TEST.parquet FOLDER [EPOCHS]

TRAIN and TEST have `image` and `label`. The network is trained on all of TRAIN (bf16, as many threads as OMP_NUM_THREADS allows; a run
that was stopped goes on from its last epoch), then moments are measured once on 4,000 of these images, without labels, and every strength of
the sweep is judged on TEST, and every share of the parameters to remove, with a strength for each group. Every method keeps as many units in
every group. The dense accuracy that so many epochs reach is told beside what is lost. What was measured and solved is kept in FOLDER.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.algorithms.images import decode
from pruning.activations import collect_grams
from pruning.allocation import Level, Sizes, allocate
from pruning.config import PruneJob
from pruning.folding import folded
from pruning.groups import find_groups
from pruning.judging import output_change
from pruning.removal import apply
from pruning.variants import METHODS, Solutions, lost_alone, solved_at_once, variant

BATCH, LR, MOMENTUM, DECAY, SMOOTHING, PAD = 128, 0.1, 0.9, 5e-4, 0.1, 4
CALIBRATION, POSITIONS, PROBED = 4_000, 16, 256
STRENGTHS = tuple(float(eps) for eps in np.geomspace(1e-3, 1e-1, 8))
SHARES = (0.5, 0.7, 0.8, 0.85, 0.89, 0.9, 0.92, 0.95)
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
STAGES = {"vgg16": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")}


def convolution(into: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out))


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = convolution(into, out, 3, stride), convolution(out, out, 3)
        self.short = nn.Identity() if stride == 1 and into == out else convolution(into, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.short(x) + self.second(torch.relu(self.first(x))))


class ResNet18(nn.Module):
    """As usual for 32-pixel images: a 3 x 3 stem without pooling."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 128, 256, 512)
        self.stem = convolution(3, 64, 3)
        blocks: list[nn.Module] = []
        for stage, width in enumerate(widths):
            blocks += [Block(widths[max(0, stage - 1)], width, 1 if stage == 0 else 2), Block(width, width, 1)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))
        return out


def vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    into = 3
    for width in STAGES["vgg16"]:
        if isinstance(width, int):
            layers += [convolution(into, width, 3), nn.ReLU()]
            into = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


NETWORKS = {"resnet18": ResNet18, "vgg16": vgg16}


def labelled(path: str) -> tuple[Tensor, Tensor]:
    """uint8 [n, 3, 32, 32], and classes [n]."""
    table = pq.read_table(path, columns=["image", "label"])
    encoded = [one["bytes"] if isinstance(one, dict) else one for one in table["image"].to_pylist()]
    pixels = [np.asarray(decode(one, 10**6)) for one in encoded]
    classes = np.unique(table["label"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)[1]
    return torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy()), torch.from_numpy(classes)


def normalised(pixels: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return ((pixels.float() / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


def moved(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Each image shifted by up to PAD pixels, and mirrored half of the time."""
    n, _, side, _ = pixels.shape
    padded = F.pad(pixels, (PAD, PAD, PAD, PAD))
    top, left = torch.randint(2 * PAD + 1, (2, n), generator=rng)
    rows, columns = top[:, None] + torch.arange(side), left[:, None] + torch.arange(side)
    columns = torch.where(torch.rand(n, 1, generator=rng) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def trained(network: nn.Module, x: Tensor, y: Tensor, folder: Path, epochs: int) -> nn.Module:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decayed = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() < 2]
    parts: list[dict[str, Any]] = [{"params": decayed, "weight_decay": DECAY}, {"params": others}]
    optimiser = torch.optim.SGD(parts, lr=LR, momentum=MOMENTUM, nesterov=True)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=epochs * steps, pct_start=0.2)
    kept, first = folder / "training.pt", 0
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        rng, started, total = torch.Generator().manual_seed(epoch), time.perf_counter(), 0.0
        network.train()
        for rows in torch.randperm(len(x), generator=rng)[: steps * BATCH].view(steps, BATCH):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = network(normalised(moved(x[rows], rng)))
            loss = F.cross_entropy(scores.float(), y[rows], label_smoothing=SMOOTHING)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        state = {
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
        }
        torch.save(state | {"epoch": epoch + 1}, kept.with_suffix(".new"))
        kept.with_suffix(".new").replace(kept)
        told = {"epoch": epoch + 1, "loss": round(total / steps, 4), "seconds": round(time.perf_counter() - started, 1)}
        print(json.dumps(told), flush=True)
    return network.eval()


def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    network.eval()
    with torch.no_grad():
        return float((torch.cat([network(normalised(part)).argmax(1) for part in x.split(250)]) == y).float().mean())


def kept_at(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, made once."""
    if not path.is_file():
        path.with_suffix(".new").write_bytes(pickle.dumps(make(), pickle.HIGHEST_PROTOCOL))
        path.with_suffix(".new").replace(path)
    return pickle.loads(path.read_bytes())


def changed(model: nn.Module, images: Tensor) -> Callable[[nn.Module], float]:
    """By how much another model's outputs differ on images."""
    with torch.no_grad():
        expected = model(images)

    def change(other: nn.Module) -> float:
        with torch.no_grad():
            return output_change(other(images), expected)

    return change


def main() -> None:
    name, train, test, folder = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    epochs = int(sys.argv[5]) if len(sys.argv) > 5 else 12
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = labelled(train), labelled(test)
    network = trained(NETWORKS[name](), x, y, folder, epochs)
    example = normalised(x[:2])
    model = folded(network, example)
    dense, size = accuracy(model, x_test, y_test), sum(p.numel() for p in model.parameters())
    print(json.dumps({"network": name, "epochs": epochs, "dense": dense, "parameters": size}), flush=True)

    groups = find_groups(model, example).prunable
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    job = PruneJob(sweep=STRENGTHS, tolerance=1e-5)
    started = time.perf_counter()
    batches = (normalised(x[part]) for part in rows.split(100))
    grams = kept_at(
        folder / "moments.pickle", lambda: collect_grams(model, groups, batches, positions_per_image=POSITIONS, seed=0)
    )
    measured = time.perf_counter() - started
    solved: Solutions = {}
    for number, group in enumerate(groups):
        began = time.perf_counter()
        found, _, refused = kept_at(
            folder / f"solved-{number}.pickle", lambda group=group: solved_at_once([group], grams, job)
        )
        solved |= found
        told = {"group": group.name, "units": group.units, "seconds": round(time.perf_counter() - began, 1)}
        print(json.dumps(told | {"refused": refused}), flush=True)
    print(json.dumps({"moments_s": round(measured, 1), "all_s": round(time.perf_counter() - started, 1)}))
    kept = [group for group in groups if group.name in solved]
    change = changed(model, normalised(x[rows[:PROBED]]))
    levels = {}
    for number, group in enumerate(kept):
        of = solved[group.name]
        lost = kept_at(
            folder / f"lost-{number}.pickle",
            lambda group=group, of=of: lost_alone(model, group, grams, job, of, change),
        )
        levels[group.name] = [Level(eps, len(of[eps].support) / group.units, lost[eps]) for eps in STRENGTHS]
    points = [({"eps_w": eps}, dict.fromkeys(solved, eps)) for eps in STRENGTHS]
    points += [({"remove": share}, allocate(Sizes.of(model, kept), levels, share)) for share in SHARES]
    for asked, strengths in points:
        scores: dict[str, float] = {}
        at = {name: solved[name][eps] for name, eps in strengths.items() if eps > 0.0}  # the others stay whole
        cut = [group for group in kept if group.name in at]
        for method in METHODS:
            chosen = variant(model, cut, grams, job, method, at)
            pruned, _ = apply(model, cut, chosen.layers, example)
            scores[method] = round(accuracy(pruned, x_test, y_test), 4)
        removed = 1 - sum(p.numel() for p in pruned.parameters()) / size
        units = [len(at[group.name].support) if group.name in at else group.units for group in kept]
        print(json.dumps(asked | {"removed": round(removed, 4), "accuracy": scores, "units": units}), flush=True)


if __name__ == "__main__":
    main()
