"""ResNet18 and VGG-16 on CIFAR-10: what pruning without fine-tuning and without labels costs.

    python benchmarks/convnets.py resnet18|vgg16 TRAIN.parquet TEST.parquet FOLDER [EPOCHS [IN_TURN [STEPS]]]

TRAIN and TEST have `image` and `label`. The network is trained on all of TRAIN for EPOCHS: a number, or numbers of epochs with the pixels of a
side, `12@16,6@24,5@32` (small images first, which take a quarter of the time; VGG-16 needs 32). It is trained in bf16, on as many threads as
OMP_NUM_THREADS allows, and a run that was stopped goes on from its last epoch. Then moments are measured once on 4,000 of these images,
without labels, and every strength of the sweep is judged on TEST, and every share of the parameters to remove, with a strength for each group.
Every method keeps as many units in every group. At the shares IN_TURN (`0.89,0.9`) layers are also refitted behind the layers pruned before
them, and then, for STEPS steps in bf16, the pruned network learns what the dense one gives for images of TRAIN, without labels. The dense
accuracy that so many epochs reach is told beside what is lost. What was measured, solved and refitted in turn is kept in FOLDER.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pruning.choosing.allocation import Level, Sizes, allocate
from lodeset.pruning.choosing.criteria import METHODS, REFITTED
from lodeset.pruning.choosing.in_turn import variant_in_turn
from lodeset.pruning.choosing.variants import Solutions, lost_alone, solved_at_once, variant
from lodeset.pruning.config import PruneJob
from lodeset.pruning.jobs.distil import towards
from lodeset.pruning.jobs.judging import output_change
from lodeset.pruning.learning.loop import Recipe
from lodeset.pruning.units.activations import Behind, collect_behind, collect_grams
from lodeset.pruning.units.folding import folded
from lodeset.pruning.units.groups import Group, find_groups, taken_by
from lodeset.pruning.units.moments import Gram
from lodeset.pruning.units.removal import apply

BATCH, LR, MOMENTUM, DECAY, SMOOTHING, PAD = 128, 0.1, 0.9, 5e-4, 0.1, 4
CALIBRATION, POSITIONS, PROBED = 4_000, 16, 256
DISTIL_LR = 1e-4
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


def sides_of(epochs: str) -> list[int]:
    """`2@16,1@32`: 16, 16, 32: the side of the images in each epoch."""
    parts = [part.partition("@") for part in epochs.split(",")]
    return [int(side or 32) for number, _, side in parts for _ in range(int(number))]


def trained(network: nn.Module, x: Tensor, y: Tensor, folder: Path, sides: list[int]) -> nn.Module:
    """After one epoch at each side, in pixels; the learning rate rises and falls once over all of them."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decayed = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() < 2]
    parts: list[dict[str, Any]] = [{"params": decayed, "weight_decay": DECAY}, {"params": others}]
    optimiser = torch.optim.SGD(parts, lr=LR, momentum=MOMENTUM, nesterov=True)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=len(sides) * steps, pct_start=0.2)
    kept, first = folder / "training.pt", 0
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    for epoch, side in list(enumerate(sides))[first:]:
        rng, started, total = torch.Generator().manual_seed(epoch), time.perf_counter(), 0.0
        network.train()
        for rows in torch.randperm(len(x), generator=rng)[: steps * BATCH].view(steps, BATCH):
            images = normalised(moved(x[rows], rng))
            if side < images.shape[-1]:
                images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = network(images.contiguous(memory_format=torch.channels_last))
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
        told = {
            "epoch": epoch + 1,
            "side": side,
            "loss": round(total / steps, 4),
            "seconds": round(time.perf_counter() - started, 1),
        }
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


@dataclass(frozen=True)
class Shifted:
    """Batches to distil on: two views of each image, shifted and mirrored as those that the network was trained on."""

    x: Tensor

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(step)
        rows = torch.randint(len(self.x), (BATCH // 2,), generator=rng)
        views = torch.stack([normalised(moved(self.x[rows], rng)) for _ in range(2)])
        return views, torch.full((len(rows),), -1)


def measured_and_solved(
    model: nn.Module, groups: Sequence[Group], images: list[Tensor], job: PruneJob, folder: Path
) -> tuple[dict[str, Gram], Solutions]:
    """The moments, and every group's solutions that could be found, at every strength."""
    started = time.perf_counter()
    batches = (normalised(part) for part in images)
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
    print(json.dumps({"moments_s": round(measured, 1), "all_s": round(time.perf_counter() - started, 1)}), flush=True)
    return grams, solved


def main() -> None:
    name, train_set, test_set, folder = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    epochs = sys.argv[5] if len(sys.argv) > 5 else "12"
    in_turn = [float(share) for share in sys.argv[6].split(",")] if len(sys.argv) > 6 else []
    steps = int(sys.argv[7]) if len(sys.argv) > 7 else 0
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = labelled(train_set), labelled(test_set)
    network = trained(NETWORKS[name](), x, y, folder, sides_of(epochs))
    example = normalised(x[:2])
    model = folded(network, example)
    dense, size = accuracy(model, x_test, y_test), sum(p.numel() for p in model.parameters())
    print(json.dumps({"network": name, "epochs": epochs, "dense": dense, "parameters": size}), flush=True)

    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    images = [x[part] for part in rows.split(100)]
    job = PruneJob(sweep=STRENGTHS, tolerance=1e-5)
    found = find_groups(model, example).prunable
    grams, solved = measured_and_solved(model, found, images, job, folder)
    groups = [group for group in found if group.name in solved]
    change = changed(model, normalised(x[rows[:PROBED]]))
    levels = {}
    for number, group in enumerate(groups):
        of = solved[group.name]
        lost = kept_at(
            folder / f"lost-{number}.pickle",
            lambda group=group, of=of: lost_alone(model, group, grams, job, of, change),
        )
        levels[group.name] = [Level(eps, len(of[eps].support) / group.units, lost[eps]) for eps in STRENGTHS]
    sizes = Sizes.of(model, groups)

    readers = {one.name for group in groups for one in group.readers}
    order = [name for name in taken_by(model, example) if name in readers]

    def measure(cut: nn.Module, order: Sequence[str], names: Sequence[str]) -> dict[str, Behind]:
        batches = (normalised(part) for part in images)
        return collect_behind(cut, model, order, names, batches, positions_per_image=POSITIONS, seed=0)

    def judged(asked: dict[str, Any], pruned: nn.Module, started: float) -> None:
        told = {
            "removed": round(1 - sum(p.numel() for p in pruned.parameters()) / size, 4),
            "lost": round(100 * (dense - accuracy(pruned, x_test, y_test)), 2),  # percentage points
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(json.dumps(asked | told), flush=True)

    def at_once(asked: dict[str, Any], strengths: Mapping[str, float], method: str) -> None:
        started = time.perf_counter()
        at = {name: solved[name][eps] for name, eps in strengths.items() if eps > 0.0}  # the others stay whole
        cut = [group for group in groups if group.name in at]
        pruned, _ = apply(model, cut, variant(model, cut, grams, job, method, at).layers, example)
        units = [len(at[group.name].support) if group.name in at else group.units for group in groups]
        judged(asked | {"method": method, "units": units}, pruned, started)

    def one_by_one(share: float, method: str) -> None:
        started, asked = time.perf_counter(), {"in_turn": share, "method": method}
        at = {name: solved[name][eps] for name, eps in allocate(sizes, levels, share).items() if eps > 0.0}
        layers = kept_at(
            folder / f"in-turn-{share:g}-{method}.pickle",
            lambda: variant_in_turn(model, groups, order, measure, job, method, at).layers,
        )
        pruned, _ = apply(model, groups, layers, example)
        judged(asked, pruned, started)
        if not steps:
            return
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # else every step sees the first one's weights
            loss = towards(model, pruned, Shifted(x), Recipe(steps, DISTIL_LR, 0.0, 0.1, 0))
        judged(asked | {"distilled": steps, "loss": round(loss, 4)}, pruned, started)

    for share in in_turn:
        for method in REFITTED:
            one_by_one(share, method)
    for share in SHARES:
        for method in METHODS:
            at_once({"remove": share}, allocate(sizes, levels, share), method)
    for eps in STRENGTHS:
        for method in METHODS:
            at_once({"eps_w": eps}, dict.fromkeys(solved, eps), method)


if __name__ == "__main__":
    main()
