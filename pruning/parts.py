"""The parts of a pruning job, which workers make each by itself: moments of some calibration images, one group's solutions over the
whole sweep, one variant (method x strength), measured and evaluated.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.algorithms.images import Unreadable, decode
from pipeline.algorithms.sampling import seeded_order
from pipeline.dag.fingerprint import file_digest
from pipeline.dag.store import File, Part, Store
from pipeline.errors import LodesetError
from pipeline.sources.reading import read_images
from pruning.activations import collect_grams
from pruning.config import PruneJob
from pruning.entropic import Rewritten, Solution
from pruning.folding import folded
from pruning.groups import Group, evaluating, find_groups, outputs_of, taken_by
from pruning.moments import Gram
from pruning.removal import apply
from pruning.report import row
from pruning.saving import load_model, save_pruned
from pruning.variants import Measure, Method, Solutions, solved_at_once, solved_in_turn, variant, variant_in_turn
from training.augment import normalised
from training.evaluate import centre_square, features
from training.index import ShardIndex, open_index
from training.targets import Target, accuracies
from training.vit import DinoVisionTransformer

GRAMS, SOLVED, VARIANT = "prune_moments", "prune_solved", "prune_variant"
IMAGES_PER_PART = 64
BATCH = 32
COMPARED = 256  # images that were not calibrated on, on which outputs are compared


@dataclass(frozen=True)
class Setting:
    """What every worker of a stage needs."""

    store: Store
    model_folder: str
    index: tuple[str, ...]  # of the shards that calibration images come from
    size: int
    calibration_max_pixels: int  # what training skipped, calibration skips
    target_max_pixels: int
    targets: tuple[Target, ...]
    folder: str  # of the pruned models, relative to the store

    def model(self) -> nn.Module:
        """The dense model; of networks that are not lodeset's, BatchNorms are part of their convolutions."""
        torch.set_num_threads(1)
        model = load_model(Path(self.model_folder))
        taken_by(model, self.example())  # says now what is wrong
        return model if isinstance(model, DinoVisionTransformer) else folded(model, self.example())

    def example(self) -> torch.Tensor:
        """Two images of noise, to trace models with and to compare them on."""
        return torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def pixels(self, index: ShardIndex, rows: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The images of these rows of the index that can be read: the centre square, [size, size, 3]."""
        found = []
        for data in index.read(rows):
            try:
                image = decode(data or b"", self.calibration_max_pixels)
            except Unreadable:
                continue
            found.append(centre_square(np.asarray(image), self.size))
        return found

    def groups(self, model: nn.Module, job: PruneJob) -> tuple[tuple[Group, ...], dict[str, str]]:
        """What the job prunes, and why the rest is left whole.

        Raises:
            LodesetError: nothing of what the job is to prune is there.
        """
        found = find_groups(model, self.example())
        wanted = {"heads": [g for g in found.prunable if g.heads], "units": [g for g in found.prunable if not g.heads]}
        skipped = dict(found.skipped)
        for kind, groups in wanted.items():
            if kind not in job.targets:
                skipped |= {group.name: f"targets are {', '.join(job.targets)}" for group in groups}
        chosen = tuple(g for g in found.prunable if any(g in wanted[kind] for kind in job.targets))
        if not chosen:
            raise LodesetError(f"the model has none of what targets asks for ({', '.join(job.targets)}): {skipped}")
        return chosen, skipped


def told(setting: Setting) -> list[Any]:
    """What the evaluation of a variant depends on."""
    return [[t.name, list(t.ids), list(t.labels), list(t.splits)] for t in setting.targets]


# -- step 1: moments


def calibration(urls: Sequence[str], job: PruneJob) -> tuple[list[list[int]], list[int]]:
    """Rows of the index, chosen by a seed and the image_ids: those to calibrate on in runs of one part, and others to compare models on."""
    index = open_index(urls)
    order = seeded_order([index.image_id(row) for row in range(len(index))], job.seed)
    chosen, rest = order[: job.calibration_images], order[job.calibration_images :]
    return [chosen[i : i + IMAGES_PER_PART] for i in range(0, len(chosen), IMAGES_PER_PART)], rest[:COMPARED]


def batched(pixels: Sequence[NDArray[np.uint8]]) -> Iterator[torch.Tensor]:
    for i in range(0, len(pixels), BATCH):
        yield normalised(torch.from_numpy(np.stack(pixels[i : i + BATCH])))


def measurer(setting: Setting, groups: Sequence[Group], job: PruneJob) -> Callable[[tuple[str, int, list[int]]], Part]:
    model, index = setting.model(), open_index(setting.index)

    def measure(item: tuple[str, int, list[int]]) -> Part:
        key, first, rows = item
        started = time.time()
        pixels = setting.pixels(index, rows)  # the part says how many could be read
        grams: dict[str, Gram] = {}
        if pixels:
            grams = collect_grams(
                model,
                groups,
                batched(pixels),
                positions_per_image=job.positions_per_image,
                seed=job.seed,
                first_image=first,
            )
        arrays = {f"{name}/{field}": array for name, gram in grams.items() for field, array in gram.arrays().items()}
        return commit_arrays(setting.store, GRAMS, key, "moments", arrays, len(pixels), started)

    return measure


def commit_arrays(
    store: Store, stage: str, key: str, name: str, arrays: Mapping[str, Any], images: int, started: float
) -> Part:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    relative = f"parts/{stage}/{key}/{uuid.uuid4().hex[:12]}-{name}.npz"
    with store.writing(relative) as sink:
        sink.write(buffer.getvalue())
    file = File(relative, len(arrays), sink.size_bytes, sink.sha256())
    return store.commit_part(stage, key, {}, {"images": images}, time.time() - started, files={name: file})


def _arrays(store: Store, file: File) -> dict[str, Any]:
    with store.fs.open(store.path(file.path), "rb") as raw, np.load(raw, allow_pickle=False) as arrays:
        return dict(arrays)


def _total(store: Store, files: Sequence[File]) -> dict[str, Gram]:
    """The moments of all calibration images, by layer: the parts' sums, added in their order, so that workers do not matter."""
    total: dict[str, Gram] = {}
    for file in files:
        split: dict[str, dict[str, Any]] = {}
        for name, array in _arrays(store, file).items():
            layer, field = name.rsplit("/", 1)
            split.setdefault(layer, {})[field] = array
        for layer, arrays in split.items():
            gram = Gram.from_arrays(arrays)
            total[layer] = total[layer] + gram if layer in total else gram
    return total


# -- step 2: solutions


def behind(setting: Setting, model: nn.Module, rows: Sequence[int], job: PruneJob) -> Measure:
    """Measures layers on the calibration images in a copy of the dense model that is pruned in part."""
    pixels = setting.pixels(open_index(setting.index), rows)

    def measure(cut: nn.Module, group: Group) -> dict[str, Gram]:
        return collect_grams(
            cut, [group], batched(pixels), positions_per_image=job.positions_per_image, seed=job.seed, dense=model
        )

    return measure


def solver(
    setting: Setting, files: Sequence[File], rows: Sequence[int], job: PruneJob
) -> Callable[[tuple[str, tuple[Group, ...], float | None]], Part]:
    """Solves some groups: over the whole sweep, or one after the other at one strength."""
    store = setting.store
    if job.mode == "sequential":
        model = setting.model()
        measure = behind(setting, model, rows, job)
    else:
        torch.set_num_threads(1)
        grams = _total(store, files)

    def solve(item: tuple[str, tuple[Group, ...], float | None]) -> Part:
        key, groups, eps_w = item
        started = time.time()
        if eps_w is None:
            solved, refused = solved_at_once(groups, grams, job)
        else:
            solved, refused = solved_in_turn(model, groups, measure, job, eps_w)
        arrays: dict[str, Any] = {f"{name}/refused": np.asarray(reason) for name, reason in refused.items()}
        for name, by_eps in solved.items():
            for eps, solution in by_eps.items():
                for field in ("w", "support", "history", "converged"):
                    arrays[f"{name}/{eps!r}/{field}"] = np.asarray(getattr(solution, field))
                for number, layer in enumerate(solution.layers):
                    for field in ("q", "bias", "unexplained"):
                        arrays[f"{name}/{eps!r}/{number}/{field}"] = np.asarray(getattr(layer, field))
        return commit_arrays(store, SOLVED, key, "solution", arrays, 0, started)

    return solve


def solutions(store: Store, files: Sequence[File]) -> tuple[Solutions, dict[str, str]]:
    """What was solved, but for groups that could not be solved at every strength; and why those could not."""
    solved: Solutions = {}
    refused: dict[str, str] = {}
    for file in files:
        arrays = _arrays(store, file)
        refused |= {label.split("/")[0]: str(a) for label, a in arrays.items() if label.endswith("/refused")}
        for name, eps in dict.fromkeys(tuple(label.split("/")[:2]) for label in arrays if label.endswith("/w")):
            solved.setdefault(name, {})[float(eps)] = _solution(arrays, f"{name}/{eps}")
    return {name: by_eps for name, by_eps in solved.items() if name not in refused}, refused


def _solution(arrays: Mapping[str, Any], of: str) -> Solution:
    layers: list[Rewritten] = []
    while f"{of}/{len(layers)}/q" in arrays:
        q, bias, unexplained = (arrays[f"{of}/{len(layers)}/{field}"] for field in ("q", "bias", "unexplained"))
        layers.append(Rewritten(q, bias, float(unexplained)))
    return Solution(
        w=arrays[f"{of}/w"],
        support=arrays[f"{of}/support"],
        layers=tuple(layers),
        history=tuple(float(v) for v in arrays[f"{of}/history"]),
        converged=bool(arrays[f"{of}/converged"]),
    )


# -- step 3: variants


def pruner(
    setting: Setting,
    groups: Sequence[Group],
    moments: Sequence[File],
    solved_in: Sequence[File],
    rows: Sequence[int],
    compared: Sequence[int],
    job: PruneJob,
    number: int,
) -> Callable[[tuple[str, float, Method]], Part]:
    store, dense, example = setting.store, setting.model(), setting.example()
    solved, _ = solutions(store, solved_in)
    if job.mode == "sequential":
        measure = behind(setting, dense, rows, job)
    else:
        grams = _total(store, moments)
    groups = [group for group in groups if group.name in solved]
    pixels = setting.pixels(open_index(setting.index), compared)
    dense_outputs = first_outputs(dense, pixels) if pixels else torch.empty(0)
    seen = next(batched(pixels)) if len(pixels) > 1 else example  # what the pruned model is compared on

    def prune(item: tuple[str, float, Method]) -> Part:
        key, eps, method = item
        started = time.time()
        if job.mode == "sequential":
            chosen = variant_in_turn(dense, groups, measure, job, eps, method, solved)
        else:
            chosen = variant(dense, groups, grams, job, eps, method, solved)
        pruned, difference = apply(dense, groups, chosen.layers, seen)
        told = {
            **row(chosen, groups, pruned, dense, example),
            "knn": accuracies_of(pruned, setting),
            "agreement": agreement(pruned, dense_outputs, pixels),
            "removal_difference": difference,
            "model": f"{setting.folder}/job-{number}/{method}-{eps!r}-{key[:8]}",
            "seconds": round(time.time() - started, 3),
        }
        files = _publish_model(store, pruned, str(told["model"]), example)
        relative = f"parts/{VARIANT}/{key}/{uuid.uuid4().hex[:12]}-row.json"
        with store.writing(relative) as sink:
            sink.write(json.dumps(told, indent=1).encode())
        files["row"] = File(relative, 1, sink.size_bytes, sink.sha256())
        return store.commit_part(VARIANT, key, {}, {"images": 0}, time.time() - started, files=files)

    return prune


def _publish_model(store: Store, model: nn.Module, relative: str, example: torch.Tensor) -> dict[str, File]:
    """The model's folder, which appears whole. One that is there already (of an attempt that was killed) stays."""
    folder = Path(store.path(relative))
    attempt = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    save_pruned(model, attempt, example)
    try:
        os.rename(attempt, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(attempt)
    return {
        path.name: File(f"{relative}/{path.name}", 0, path.stat().st_size, file_digest(str(path)))
        for path in sorted(folder.iterdir())
    }


def first_outputs(model: nn.Module, pixels: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """What a model returns first (CLS features, scores of classes) for each image: [n, D]."""
    with evaluating(model):
        return torch.cat([outputs_of(model(images))[0].flatten(1) for images in batched(pixels)])


def agreement(model: nn.Module, expected: torch.Tensor, pixels: Sequence[NDArray[np.uint8]]) -> float | None:
    """Mean cosine of a model's first outputs with `expected` [n, D]; None where there are no images."""
    if not pixels:
        return None
    return round(float(torch.cosine_similarity(first_outputs(model, pixels), expected).mean()), 5)


def accuracies_of(model: nn.Module, setting: Setting) -> dict[str, dict[str, float]]:
    """kNN accuracy on every target set, by k."""
    found: dict[str, dict[str, float]] = {}
    for target in setting.targets:
        assert isinstance(model, DinoVisionTransformer)  # others are pruned without target sets
        images = (np.asarray(decode(data, setting.target_max_pixels)) for _, data in read_images(target.places))
        found[target.name] = dict(accuracies(target, features(model, images, setting.size, BATCH)))
    return found
