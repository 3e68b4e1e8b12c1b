"""The pruning half of the DAG: checkpoint + calibration images -> `prune`.

Parts come in three steps, each of which Ray workers share: moments, solutions, variants. No part reads what another of its step makes.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import TargetSet
from pipeline.dag.fingerprint import digest
from pipeline.dag.stage import Context, Input, Outcome, Stage
from pipeline.dag.store import File, Rows, Store
from pipeline.engines.ray import map_with_state
from pipeline.errors import LodesetError
from pipeline.stages.parts import made
from pipeline.stages.write_shards import IMAGES
from pruning.config import PruneJob
from pruning.groups import Group
from pruning.parts import (
    GRAMS,
    IMAGES_PER_PART,
    SOLVED,
    VARIANT,
    Setting,
    accuracies_of,
    calibration,
    measurer,
    pruner,
    solutions,
    solver,
    told,
)
from pruning.variants import METHODS
from training import cost
from training.config import TrainingConfig
from training.targets import read_target

VERSION = 3
STAGE = "prune"
SECONDS_A_VARIANT = 1.4  # the demo's 18 variants, moments and solutions included, 2 CPU cores


def build(
    jobs: Sequence[PruneJob],
    targets: Sequence[TargetSet],
    above: Mapping[str, Stage],
    max_pixels: int,
) -> dict[str, Stage]:
    """`prune`, where there are jobs; `max_pixels` is the limit that the target sets' images were ingested with."""
    if not jobs:
        return {}
    trained = list(dict.fromkeys(job.checkpoint for job in jobs))
    configs = {name: above[f"{name}/all"].speed["training"] for name in trained}
    stage = Stage(
        STAGE,
        "all",
        VERSION,
        "ray",
        run,
        config={"jobs": list(jobs), "targets": [t.model_dump(include={"name", "label", "split"}) for t in targets]},
        inputs={
            **{name: Input(above[f"{name}/all"]) for name in trained},
            "shards": Input(above["write_shards/all"], IMAGES),
            **{f"images:{t.name}": Input(above[f"ingest/{t.name}"], "metadata") for t in targets},
        },
        speed={"jobs": tuple(jobs), "training": configs, "targets": tuple(targets), "max_pixels": max_pixels},
        seconds_per_image=SECONDS_A_VARIANT,
        work=sum(len(job.sweep) * len(METHODS) for job in jobs),
        size_bytes=sum(_stored_bytes(job, configs[job.checkpoint]) for job in jobs),
    )
    return {stage.id: stage}


def _stored_bytes(job: PruneJob, training: TrainingConfig) -> int:
    """The moments of every part (float64: inputs x inputs, inputs x outputs), and a model a variant, whole at the most."""
    model = training.model
    read = [{"units": model.hidden, "heads": model.dim}[target] for target in job.targets]
    moments = -(-job.calibration_images // IMAGES_PER_PART) * model.depth * sum(n * (n + model.dim) * 8 for n in read)
    return moments + len(job.sweep) * len(METHODS) * cost.BYTES_A_WEIGHT * cost.backbone_parameters(training)


def run(context: Context) -> Outcome:
    store = context.store
    targets = tuple(
        read_target(store, context.inputs[f"images:{t.name}"], t.name, t.label, t.split)[0]
        for t in context.speed["targets"]
    )
    configs: Mapping[str, TrainingConfig] = context.speed["training"]
    folder = f"pruned/{context.fingerprint[:16]}"
    settings = {
        name: Setting(
            store,
            store.path(str(context.inputs[name].details["folder"])),
            (store.full_url(context.inputs["shards"].tables["index"][0].path),),
            config.crops.global_size,
            config.max_pixels,
            context.speed["max_pixels"],
            targets,
            folder,
        )
        for name, config in configs.items()
    }
    dense = {name: accuracies_of(setting.model(), setting) for name, setting in settings.items()}
    reports, files, parts_made, parts = [], [], 0, 0
    for number, job in enumerate(context.speed["jobs"]):
        basis = (context.inputs[job.checkpoint].fingerprint, context.inputs["shards"].content[IMAGES])
        report, models, job_parts, job_made = run_job(
            context, settings[job.checkpoint], basis, job, number, dense[job.checkpoint]
        )
        reports.append(report)
        files += models
        parts, parts_made = parts + job_parts, parts_made + job_made
    report_file = _write_report(store, folder, context.fingerprint, reports)
    wanted = len(reports)
    return Outcome(
        tables={"report": (report_file,), "models": tuple(files)},
        rows=Rows(taken=wanted, kept=wanted),
        details={
            "jobs": reports,
            "parts": parts,
            "parts_made": parts_made,
            "folder": folder,
            "work": context.stage.work,
        },
    )


def run_job(
    context: Context,
    setting: Setting,
    basis: tuple[str, str],
    job: PruneJob,
    number: int,
    dense: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, Any], list[File], int, int]:
    """Report, models, parts, and parts that this run made; `basis` is which model on which images.

    Raises:
        LodesetError: no image can be read, or the model or the moments cannot be used.
    """
    started = time.time()
    store = context.store
    share = functools.partial(map_with_state, cpus=context.cpus, address=context.ray_address)

    runs, compared = calibration(setting.index, job)
    sampled = (job.calibration_images, job.positions_per_image, job.seed, job.targets)
    work = [
        (key, (key, i * IMAGES_PER_PART, run), len(run))
        for i, run in enumerate(runs)
        if (key := digest(GRAMS, VERSION, *basis, setting.size, *sampled, i))
    ]
    groups, skipped = setting.groups(setting.model(), job)
    measure = functools.partial(measurer, setting, groups, job)
    moments, new_moments = made(context, GRAMS, work, functools.partial(share, measure))
    images = sum(p.counts["images"] for p in moments)
    if images == 0:
        raise LodesetError(f"none of the {sum(map(len, runs))} calibration images could be read: check the shards")
    files = tuple(p.files["moments"] for p in moments)

    solve = digest(SOLVED, VERSION, [p.key for p in moments], job)
    rows = [row for run in runs for row in run]
    # A group by itself over the whole sweep, or all of them one after the other at one strength.
    pieces: list[tuple[tuple[Group, ...], float | None]] = [((group,), None) for group in groups]
    if job.mode == "sequential":
        pieces = [(groups, eps) for eps in sorted(job.sweep)]
    layers = [
        (key, (key, *piece), 1) for piece in pieces if (key := digest(solve, [g.name for g in piece[0]], piece[1]))
    ]
    make_solutions = functools.partial(solver, setting, files, rows, job)
    solved, new_solved = made(context, SOLVED, layers, functools.partial(share, make_solutions), unit="groups")

    solved_in = tuple(p.files["solution"] for p in solved)
    _, refused = solutions(store, solved_in)
    if len(refused) == len(groups):
        raise LodesetError(f"nothing can be pruned: {'; '.join(refused.values())}")
    wanted = [(eps, method) for eps in sorted(job.sweep) for method in METHODS]
    variants = [
        (key, (key, eps, method), 1)
        for eps, method in wanted
        if (key := digest(VARIANT, VERSION, solve, eps, method, told(setting)))
    ]
    make = functools.partial(pruner, setting, groups, files, solved_in, rows, compared, job, number)
    done, new_done = made(context, VARIANT, variants, functools.partial(share, make), unit="variants")
    rows = [json.loads(store.read(p.files["row"].path) or b"{}") for p in done]
    report = {
        "job": job.model_dump(mode="json"),
        "calibration_images": images,
        "skipped_modules": skipped | refused,
        "knn_dense": dense,
        "variants": rows,
        "seconds": round(time.time() - started, 2),
    }
    models = [file for p in done for name, file in sorted(p.files.items()) if name != "row"]
    return report, models, len(moments) + len(solved) + len(done), len(new_moments) + len(new_solved) + len(new_done)


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
