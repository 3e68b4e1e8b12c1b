"""The pruning half of the DAG: checkpoint + calibration images -> `prune`.

Parts, in three steps, each of which Ray workers share: moments of a run of calibration images; one layer's solutions over
the whole sweep; one variant (method x strength), measured and evaluated. No part reads what another of its step makes.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.algorithms.images import Unreadable, decode
from pipeline.algorithms.sampling import seeded_order
from pipeline.config import TargetSet
from pipeline.dag.fingerprint import digest, file_digest
from pipeline.dag.stage import Context, Input, Outcome, Stage
from pipeline.dag.store import File, Part, Rows, Store
from pipeline.engines.ray import map_with_state
from pipeline.errors import LodesetError
from pipeline.sources.reading import read_images
from pipeline.stages.parts import made
from pipeline.stages.write_shards import IMAGES
from pruning.config import PruneJob
from pruning.entropic import Gram, Solution, path
from pruning.groups import apply, check_removal, collect_grams, find_groups, save_pruned
from pruning.report import METHODS, Method, row, variant
from training import cost
from training.augment import normalised
from training.config import TrainingConfig
from training.evaluate import centre_square, features
from training.export import load_backbone
from training.index import open_index
from training.targets import Target, accuracies, read_target
from training.vit import DinoVisionTransformer

VERSION = 1
STAGE, GRAMS, SOLVED, VARIANT = "prune", "prune_moments", "prune_solved", "prune_variant"
IMAGES_PER_PART = 64
BATCH = 32
SECONDS_A_VARIANT = 1.4  # the demo's 18 variants, moments and solutions included, 2 CPU cores


def build(
    jobs: Sequence[PruneJob],
    training: TrainingConfig,
    targets: Sequence[TargetSet],
    above: Mapping[str, Stage],
    max_pixels: int,
) -> dict[str, Stage]:
    """`prune`, where there are jobs; `max_pixels` is the limit that the target sets' images were ingested with."""
    if not jobs:
        return {}
    stage = Stage(
        STAGE,
        "all",
        VERSION,
        "ray",
        run,
        config={"jobs": list(jobs), "targets": [t.model_dump(include={"name", "label", "split"}) for t in targets]},
        inputs={
            "train": Input(above["train/all"]),
            "shards": Input(above["write_shards/all"], IMAGES),
            **{f"images:{t.name}": Input(above[f"ingest/{t.name}"], "metadata") for t in targets},
        },
        speed={"jobs": tuple(jobs), "training": training, "targets": tuple(targets), "max_pixels": max_pixels},
        seconds_per_image=SECONDS_A_VARIANT,
        work=sum(len(job.sweep) * len(METHODS) for job in jobs),
        size_bytes=_stored_bytes(jobs, training),
    )
    return {stage.id: stage}


def _stored_bytes(jobs: Sequence[PruneJob], training: TrainingConfig) -> int:
    """The moments of every part (float64: units x units, units x outputs), and a model a variant, whole at the most."""
    dim, total = training.model.dim, 0
    for job in jobs:
        parts = -(-job.calibration_images // IMAGES_PER_PART)
        moments = parts * training.model.depth * (4 * dim) * (4 * dim + dim) * 8
        models = len(job.sweep) * len(METHODS) * cost.BYTES_A_WEIGHT * cost.backbone_parameters(training)
        total += moments + models
    return total


@dataclass(frozen=True)
class Setting:
    """What every worker of a stage needs."""

    store: Store
    model_folder: str
    index_url: str
    size: int
    calibration_max_pixels: int  # what training skipped, calibration skips
    target_max_pixels: int
    targets: tuple[Target, ...]
    folder: str  # of the pruned models, relative to the store

    def model(self) -> DinoVisionTransformer:
        torch.set_num_threads(1)
        return load_backbone(Path(self.model_folder))


def run(context: Context) -> Outcome:
    store, trained = context.store, context.inputs["train"]
    config: TrainingConfig = context.speed["training"]
    targets = tuple(
        read_target(store, context.inputs[f"images:{t.name}"], t.name, t.label, t.split)[0]
        for t in context.speed["targets"]
    )
    setting = Setting(
        store,
        store.path(str(trained.details["folder"])),
        store.full_url(context.inputs["shards"].tables["index"][0].path),
        config.crops.global_size,
        config.max_pixels,
        context.speed["max_pixels"],
        targets,
        f"pruned/{context.fingerprint[:16]}",
    )
    reports, files, parts_made, parts = [], [], 0, 0
    dense = _accuracies(setting.model(), setting)
    for number, job in enumerate(context.speed["jobs"]):
        report, models, job_parts, job_made = _run_job(context, setting, job, number, dense)
        reports.append(report)
        files += models
        parts, parts_made = parts + job_parts, parts_made + job_made
    report_file = _write_report(store, setting.folder, context.fingerprint, reports)
    wanted = len(reports)
    return Outcome(
        tables={"report": (report_file,), "models": tuple(files)},
        rows=Rows(taken=wanted, kept=wanted),
        details={
            "jobs": reports,
            "parts": parts,
            "parts_made": parts_made,
            "folder": setting.folder,
            "work": context.stage.work,
        },
    )


def _run_job(
    context: Context, setting: Setting, job: PruneJob, number: int, dense: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, Any], list[File], int, int]:
    started = time.time()
    store = context.store
    basis = (context.inputs["train"].fingerprint, context.inputs["shards"].content[IMAGES], setting.size)
    share = functools.partial(map_with_state, cpus=context.cpus, address=context.ray_address)

    runs = _calibration(setting.index_url, job)
    sampled = (job.calibration_images, job.positions_per_image, job.seed)
    work = [
        (key, (key, i * IMAGES_PER_PART, run), len(run))
        for i, run in enumerate(runs)
        if (key := digest(GRAMS, VERSION, *basis, *sampled, i))
    ]
    moments, new_moments = made(
        context, GRAMS, work, functools.partial(share, functools.partial(_measurer, setting, job))
    )
    images = sum(p.counts["images"] for p in moments)
    if images == 0:
        raise LodesetError(f"none of the {sum(map(len, runs))} calibration images could be read: check the shards")
    files = tuple(p.files["moments"] for p in moments)

    groups = find_groups(setting.model())
    solve = digest(SOLVED, VERSION, [p.key for p in moments], job)
    layers = [(key, (key, g.name), 1) for g in groups.prunable if (key := digest(solve, g.name))]
    solver = functools.partial(_solver, store, files, job)
    solved, new_solved = made(context, SOLVED, layers, functools.partial(share, solver), unit="layers")

    wanted = [(eps, method) for eps in sorted(job.sweep) for method in METHODS]
    variants = [
        (key, (key, eps, method), 1)
        for eps, method in wanted
        if (key := digest(VARIANT, VERSION, solve, eps, method, _told(setting)))
    ]
    pruner = functools.partial(_pruner, setting, files, tuple(p.files["solution"] for p in solved), job, number)
    done, new_done = made(context, VARIANT, variants, functools.partial(share, pruner), unit="variants")
    rows = [json.loads(store.read(p.files["row"].path) or b"{}") for p in done]
    report = {
        "job": job.model_dump(mode="json"),
        "calibration_images": images,
        "skipped_modules": groups.skipped,
        "knn_dense": dense,
        "variants": rows,
        "seconds": round(time.time() - started, 2),
    }
    models = [file for p in done for name, file in sorted(p.files.items()) if name != "row"]
    return report, models, len(moments) + len(solved) + len(done), len(new_moments) + len(new_solved) + len(new_done)


def _told(setting: Setting) -> list[Any]:
    """What the evaluation of a variant depends on."""
    return [[t.name, list(t.ids), list(t.labels), list(t.splits)] for t in setting.targets]


# -- step 1: moments


def _calibration(index_url: str, job: PruneJob) -> list[list[int]]:
    """Rows of the index in runs of one part, chosen by a seed and the image_ids."""
    index = open_index([index_url])
    order = seeded_order([index.image_id(row) for row in range(len(index))], job.seed)[: job.calibration_images]
    return [order[i : i + IMAGES_PER_PART] for i in range(0, len(order), IMAGES_PER_PART)]


def _measurer(setting: Setting, job: PruneJob) -> Callable[[tuple[str, int, list[int]]], Part]:
    model, index = setting.model(), open_index([setting.index_url])
    groups = find_groups(model)

    def measure(item: tuple[str, int, list[int]]) -> Part:
        key, first, rows = item
        started = time.time()
        pixels = []
        for data in index.read(rows):
            try:
                pixels.append(
                    centre_square(np.asarray(decode(data or b"", setting.calibration_max_pixels)), setting.size)
                )
            except Unreadable:
                continue  # counted: the part says how many images it holds
        batches = (normalised(torch.from_numpy(np.stack(pixels[i : i + BATCH]))) for i in range(0, len(pixels), BATCH))
        grams: dict[str, Gram] = {}
        if pixels:
            grams = collect_grams(
                model, groups, batches, positions_per_image=job.positions_per_image, seed=job.seed, first_image=first
            )
        arrays = {f"{name}/{field}": array for name, gram in grams.items() for field, array in gram.arrays().items()}
        return _commit_arrays(setting.store, GRAMS, key, "moments", arrays, len(pixels), started)

    return measure


def _commit_arrays(
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
    """The moments of all calibration images: the parts' sums, added in their order, so that workers do not matter."""
    total: dict[str, Gram] = {}
    for file in files:
        split: dict[str, dict[str, Any]] = {}
        for name, array in _arrays(store, file).items():
            group, field = name.rsplit("/", 1)
            split.setdefault(group, {})[field] = array
        for group, arrays in split.items():
            gram = Gram.from_arrays(arrays)
            total[group] = total[group] + gram if group in total else gram
    return total


# -- step 2: solutions


def _solver(store: Store, files: Sequence[File], job: PruneJob) -> Callable[[tuple[str, str]], Part]:
    torch.set_num_threads(1)
    grams = _total(store, files)

    def solve(item: tuple[str, str]) -> Part:
        key, name = item
        started = time.time()
        arrays: dict[str, Any] = {}
        for eps, solution in path(grams[name], name, job).items():
            arrays |= {f"{eps!r}/{field}": np.asarray(value) for field, value in asdict(solution).items()}
        arrays["name"] = np.asarray(name)
        return _commit_arrays(store, SOLVED, key, "solution", arrays, 0, started)

    return solve


def _solutions(store: Store, files: Sequence[File]) -> dict[str, dict[float, Solution]]:
    solved: dict[str, dict[float, Solution]] = {}
    for file in files:
        arrays = _arrays(store, file)
        name = str(arrays.pop("name"))
        by_eps: dict[float, dict[str, Any]] = {}
        for label, array in arrays.items():
            eps, field = label.split("/")
            by_eps.setdefault(float(eps), {})[field] = array
        solved[name] = {eps: _solution(fields) for eps, fields in by_eps.items()}
    return solved


def _solution(fields: Mapping[str, Any]) -> Solution:
    plain = {**fields, "converged": bool(fields["converged"]), "unexplained": float(fields["unexplained"])}
    plain["history"] = tuple(float(v) for v in fields["history"])
    return Solution(**plain)


# -- step 3: variants


def _pruner(
    setting: Setting, moments: Sequence[File], solutions: Sequence[File], job: PruneJob, number: int
) -> Callable[[tuple[str, float, Method]], Part]:
    store, dense = setting.store, setting.model()
    groups = find_groups(dense)
    grams, solved = _total(store, moments), _solutions(store, solutions)
    probe = torch.randn(4, 3, setting.size, setting.size, generator=torch.Generator().manual_seed(0))

    def prune(item: tuple[str, float, Method]) -> Part:
        key, eps, method = item
        started = time.time()
        chosen = variant(dense, groups, grams, job, eps, method, solved)
        pruned = apply(dense, chosen.layers)
        difference = check_removal(pruned, dense, chosen.layers, probe)
        told = {
            **row(chosen, pruned, dense, setting.size),
            "knn": _accuracies(pruned, setting),
            "removal_difference": difference,
            "model": f"{setting.folder}/job-{number}/{method}-{eps!r}",
            "seconds": round(time.time() - started, 3),
        }
        files = _publish_model(store, pruned, str(told["model"]))
        relative = f"parts/{VARIANT}/{key}/{uuid.uuid4().hex[:12]}-row.json"
        with store.writing(relative) as sink:
            sink.write(json.dumps(told, indent=1).encode())
        files["row"] = File(relative, 1, sink.size_bytes, sink.sha256())
        return store.commit_part(VARIANT, key, {}, {"images": 0}, time.time() - started, files=files)

    return prune


def _publish_model(store: Store, model: DinoVisionTransformer, relative: str) -> dict[str, File]:
    """The model's folder, which appears whole. One that is there already (of an attempt that was killed) stays."""
    folder = Path(store.path(relative))
    attempt = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    save_pruned(model, attempt)
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


def _accuracies(model: DinoVisionTransformer, setting: Setting) -> dict[str, dict[str, float]]:
    """kNN accuracy on every target set, by k."""
    found: dict[str, dict[str, float]] = {}
    for target in setting.targets:
        images = (np.asarray(decode(data, setting.target_max_pixels)) for _, data in read_images(target.places))
        found[target.name] = dict(accuracies(target, features(model, images, setting.size, BATCH)))
    return found


def _write_report(store: Store, folder: str, fingerprint: str, reports: Sequence[Mapping[str, Any]]) -> File:
    key = digest("prune_report", VERSION, fingerprint)
    found = store.part("prune_report", key)
    if found is None:
        relative = f"{folder}/report.json"
        with store.writing(relative) as sink:
            sink.write(json.dumps(list(reports), indent=1).encode())
        file = File(relative, len(reports), sink.size_bytes, sink.sha256())
        found = store.commit_part("prune_report", key, {}, {}, files={"report": file})
    return found.files["report"]
