"""The parts of a pruning job, each made by one worker: moments of some calibration images, one group's solutions over
the whole sweep, one variant (method x strength), measured and evaluated.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lodeset.pipeline.algorithms.sampling import seeded_order
from lodeset.pipeline.dag.fingerprint import file_digest
from lodeset.pipeline.dag.store import File, Part, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.allocation import Level, Sizes, allocate
from lodeset.pruning.choosing.entropic import Rewritten, Solution
from lodeset.pruning.choosing.in_turn import Measure, solved_in_turn, variant_in_turn
from lodeset.pruning.choosing.variants import Paths, lost_alone, solved_at_once, units_kept, variant
from lodeset.pruning.config import PruneJob
from lodeset.pruning.formats.saving import save_pruned
from lodeset.pruning.jobs.cost import row
from lodeset.pruning.jobs.judging import batched, output_change, seen
from lodeset.pruning.jobs.setting import Setting, kept_file
from lodeset.pruning.specs import PROBED, images_per_part
from lodeset.pruning.units.activations import Behind, collect_behind, collect_grams
from lodeset.pruning.units.groups import Group, taken_by
from lodeset.pruning.units.moments import Gram, Indices
from lodeset.pruning.units.removal import apply
from lodeset.training.index import open_index

GRAMS, SOLVED, VARIANT = "prune_moments", "prune_solved", "prune_variant"
COMPARED = 256  # images outside the calibration set on which outputs are compared


# -- step 1: moments


def calibration(urls: Sequence[str], job: PruneJob) -> tuple[list[list[int]], list[int]]:
    """Rows of the index, chosen by a seed and the image_ids: calibration rows in runs of one part each, and other rows
    to compare models on.
    """
    index = open_index(urls)
    order = seeded_order([index.image_id(row) for row in range(len(index))], job.seed)
    chosen, rest = order[: job.calibration_images], order[job.calibration_images :]
    size = images_per_part(job.calibration_images)
    return [chosen[i : i + size] for i in range(0, len(chosen), size)], rest[:COMPARED]


def measurer(setting: Setting, groups: Sequence[Group], job: PruneJob) -> Callable[[tuple[str, int, list[int]]], Part]:
    model, index = setting.model(), open_index(setting.index)

    def measure(item: tuple[str, int, list[int]]) -> Part:
        key, first, rows = item
        started = time.time()
        pixels = setting.pixels(index, rows)  # the part records how many could be read
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
    file = kept_file(store, stage, key, f"{name}.npz", buffer.getvalue(), len(arrays))
    return store.commit_part(stage, key, {}, {"images": images}, time.time() - started, files={name: file})


def _arrays(store: Store, file: File, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Any]:
    with store.opened(file) as raw, np.load(raw, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if wanted(name)}


def _total(store: Store, files: Sequence[File]) -> dict[str, Gram]:
    """The moments of all calibration images, by layer. Parts are added in their order, so the result does not depend on
    the workers.
    """
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


def order_of(setting: Setting, model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """The layers that read the groups, in the order of a forward pass."""
    readers = {reader.name for group in groups for reader in group.readers}
    return [name for name in taken_by(model, setting.example()) if name in readers]


def behind(setting: Setting, model: nn.Module, rows: Sequence[int], job: PruneJob) -> Measure:
    """Return a function that measures layers on the calibration images in a partially pruned copy of the dense
    model.
    """
    pixels = setting.pixels(open_index(setting.index), rows)

    def measure(cut: nn.Module, order: Sequence[str], names: Sequence[str]) -> dict[str, Behind]:
        batches, positions = batched(pixels), job.positions_per_image
        return collect_behind(cut, model, order, names, batches, positions_per_image=positions, seed=job.seed)

    return measure


def solver(
    setting: Setting, files: Sequence[File], rows: Sequence[int], job: PruneJob
) -> Callable[[tuple[str, tuple[Group, ...], float | None]], Part]:
    """Solve some groups: one group over the whole sweep, or several one after the other at one strength."""
    store = setting.store
    if job.solved_in_turn:
        model = setting.model()
        measure = behind(setting, model, rows, job)
    else:
        torch.set_num_threads(1)
        grams = _total(store, files)
        if job.remove:
            model = setting.model()
            change = changer(setting, model, rows)

    def solve(item: tuple[str, tuple[Group, ...], float | None]) -> Part:
        key, groups, eps_w = item
        started = time.time()
        if eps_w is None:
            solved, paths, refused = solved_at_once(groups, grams, job)
        else:
            order = order_of(setting, model, groups)
            solved, refused = solved_in_turn(model, groups, order, measure, job, eps_w)
            paths = {name: {eps_w: by_eps[eps_w].w} for name, by_eps in solved.items()}
        arrays: dict[str, Any] = {f"{name}/refused": np.asarray(reason) for name, reason in refused.items()}
        arrays |= {f"{name}/{eps!r}/followed": w for name, path in paths.items() for eps, w in path.items()}
        for name, by_eps in solved.items():
            for eps, solution in by_eps.items():
                for field in ("w", "support", "history", "converged"):
                    arrays[f"{name}/{eps!r}/{field}"] = np.asarray(getattr(solution, field))
                for number, layer in enumerate(solution.layers):
                    for field in ("q", "bias", "unexplained"):
                        arrays[f"{name}/{eps!r}/{number}/{field}"] = np.asarray(getattr(layer, field))
        if job.remove:
            for group in (member for member in groups if member.name in solved):
                alone = lost_alone(model, group, grams, job, solved[group.name], change)
                arrays |= {f"{group.name}/{eps!r}/lost": np.asarray(lost) for eps, lost in alone.items()}
        return commit_arrays(store, SOLVED, key, "solution", arrays, 0, started)

    return solve


def changer(setting: Setting, model: nn.Module, rows: Sequence[int]) -> Callable[[nn.Module], float]:
    """Return a function that measures how much another model's features differ from the dense model's on some
    calibration images: the mean square, over their variance.

    Raises:
        LodesetError: the dense model's features do not vary, so no change can be measured.
    """
    index, pixels = open_index(setting.index), []
    for first in range(0, len(rows), PROBED):
        pixels += setting.pixels(index, rows[first : first + PROBED])
        if len(pixels) >= PROBED:
            break
    del pixels[PROBED:]
    expected = seen(model, pixels)
    if not len(expected) or not expected.double().var(dim=0, correction=0).any():
        raise LodesetError(
            "remove measures how much pruning changes the model's outputs, and these do not vary over the "
            f"{len(pixels)} calibration images that "
            "could be read: raise calibration_images, or give strengths (sweep) without remove"
        )

    return lambda other: output_change(seen(other, pixels), expected)


@dataclass(frozen=True)
class Choice:
    """What one strength keeps of a group, and the loss of the model's outputs if it was measured."""

    support: Indices
    lost: float


def choices(store: Store, files: Sequence[File]) -> tuple[dict[str, dict[float, Choice]], dict[str, str]]:
    """The solutions of every group that could be solved at every strength; and why the other groups could not."""
    solved: dict[str, dict[float, Choice]] = {}
    refused: dict[str, str] = {}
    for file in files:
        arrays = _arrays(store, file, lambda label: label.endswith(("/support", "/lost", "/refused")))
        refused |= {label.split("/")[0]: str(a) for label, a in arrays.items() if label.endswith("/refused")}
        for name, eps in (label.split("/")[:2] for label in arrays if label.endswith("/support")):
            lost = float(arrays.get(f"{name}/{eps}/lost", np.nan))
            solved.setdefault(name, {})[float(eps)] = Choice(arrays[f"{name}/{eps}/support"], lost)
    return {name: by_eps for name, by_eps in solved.items() if name not in refused}, refused


def solutions(store: Store, files: Sequence[File], strengths: Mapping[str, float]) -> dict[str, Solution]:
    """Each group's solution at its strength."""
    of = {name: f"{name}/{eps!r}/" for name, eps in strengths.items()}
    arrays: dict[str, Any] = {}
    for file in files:
        arrays |= _arrays(store, file, lambda label: label.startswith(tuple(of.values())))
    return {name: _solution(arrays, start) for name, start in of.items()}


def paths_of(store: Store, files: Sequence[File]) -> Paths:
    """w by group and strength, at every strength that was solved along the path."""
    paths: Paths = {}
    for file in files:
        for label, w in _arrays(store, file, lambda label: label.endswith("/followed")).items():
            name, eps, _ = label.split("/")
            paths.setdefault(name, {})[float(eps)] = w
    return paths


def _solution(arrays: Mapping[str, Any], of: str) -> Solution:
    layers: list[Rewritten] = []
    while f"{of}{len(layers)}/q" in arrays:
        q, bias, unexplained = (arrays[f"{of}{len(layers)}/{field}"] for field in ("q", "bias", "unexplained"))
        layers.append(Rewritten(q, bias, float(unexplained)))
    return Solution(
        w=arrays[f"{of}w"],
        support=arrays[f"{of}support"],
        layers=tuple(layers),
        history=tuple(float(v) for v in arrays[f"{of}history"]),
        converged=bool(arrays[f"{of}converged"]),
    )


# -- step 3: variants


@dataclass(frozen=True)
class Point:
    """What models are made for, one per method: a strength, or a share of the parameters to remove; and the strength of
    each group there (0: left whole).
    """

    at: float
    strengths: Mapping[str, float]


def points(
    job: PruneJob, model: nn.Module, groups: Sequence[Group], solved: Mapping[str, Mapping[float, Choice]]
) -> list[Point]:
    """The points of the job, in their order.

    Raises:
        LodesetError: a share cannot be removed at the strengths of the sweep.
    """
    if not job.remove:
        return [Point(eps, dict.fromkeys(solved, eps)) for eps in job.points]
    groups = [group for group in groups if group.name in solved]
    levels = {
        group.name: [
            Level(eps, units_kept(group, len(choice.support), job.round_to) / group.units, choice.lost)
            for eps, choice in sorted(solved[group.name].items())
        ]
        for group in groups
    }
    sizes = Sizes.of(model, groups)
    return [Point(share, allocate(sizes, levels, share)) for share in job.points]


def pruner(
    setting: Setting,
    groups: Sequence[Group],
    moments: Sequence[File],
    solved_in: Sequence[File],
    rows: Sequence[int],
    compared: Sequence[int],
    job: PruneJob,
    number: int,
) -> Callable[[tuple[str, Point, str]], Part]:
    store, dense, example = setting.store, setting.model(), setting.example()
    if job.mode == "sequential":
        order = order_of(setting, dense, groups)
        measure = behind(setting, dense, rows, job)
    else:
        grams = _total(store, moments)
    pixels = setting.pixels(open_index(setting.index), compared)
    dense_outputs = seen(dense, pixels)
    compared_on = next(batched(pixels)) if len(pixels) > 1 else example  # images to compare the pruned model on

    def prune(item: tuple[str, Point, str]) -> Part:
        key, point, method = item
        started = time.time()
        of = [group for group in groups if group.name in point.strengths]
        solved = solutions(store, solved_in, {name: eps for name, eps in point.strengths.items() if eps > 0.0})
        cut = [group for group in of if group.name in solved]
        if job.mode == "sequential":
            chosen = variant_in_turn(dense, of, order, measure, job, method, solved)
        else:
            chosen = variant(dense, cut, grams, job, method, solved)
        pruned, difference = apply(dense, of, chosen.layers, compared_on)
        report_row = {
            job.swept: point.at,
            **({"strengths": point.strengths} if job.remove else {}),
            **row(chosen, of, pruned, dense, example),
            "knn": setting.knn(pruned),
            "agreement": agreement(pruned, dense_outputs, pixels),
            "removal_difference": difference,
            "model": f"{setting.folder}/job-{number}/{method}-{point.at!r}-{key[:8]}",
            "seconds": round(time.time() - started, 3),
        }
        files = publish(store, str(report_row["model"]), lambda folder: save_pruned(pruned, folder, example))
        files["row"] = kept_file(store, VARIANT, key, "row.json", json.dumps(report_row, indent=1).encode())
        return store.commit_part(VARIANT, key, {}, {"images": 0}, time.time() - started, files=files)

    return prune


def publish(store: Store, relative: str, write: Callable[[Path], None]) -> dict[str, File]:
    """Create a folder in the store that `write` fills and that appears as a whole.

    No manifest lists the files of a folder that already exists: an attempt was killed before it committed its part, or
    the part's manifest was damaged. Such a folder stays if its bytes are the same, and is replaced otherwise. A remote
    store has no folders: there, each file is replaced, and the part's manifest makes them one.
    """
    if not store.local:
        with tempfile.TemporaryDirectory(prefix="lodeset-model-") as made_here:
            write(Path(made_here, "model"))
            return {
                path.name: _sent(store, path, f"{relative}/{path.name}") for path in _files(Path(made_here, "model"))
            }
    folder = Path(store.path(relative))
    attempt = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    write(attempt)
    made = _digests(attempt)
    while True:
        try:
            os.rename(attempt, folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _digests(folder) == made:
            shutil.rmtree(attempt)
            break
        stale = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):  # another attempt took it away first
            os.rename(folder, stale)
            shutil.rmtree(stale)
    return {
        name: File(f"{relative}/{name}", 0, (folder / name).stat().st_size, sha256) for name, sha256 in made.items()
    }


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder, by its name."""
    return {path.name: file_digest(str(path)) for path in _files(folder)}


def _sent(store: Store, path: Path, relative: str) -> File:
    store.upload(path, relative)
    return File(relative, 0, path.stat().st_size, file_digest(str(path)))


def agreement(model: nn.Module, expected: torch.Tensor, pixels: Sequence[NDArray[np.uint8]]) -> float | None:
    """Mean cosine between a model's first outputs and `expected` [n, D]; None if there are no images."""
    if not pixels:
        return None
    return round(float(torch.cosine_similarity(seen(model, pixels), expected).mean()), 5)
