"""The pruning half of the DAG: checkpoint + calibration images -> `prune`, job after job."""

from __future__ import annotations

import functools
import json
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from lodeset.pipeline.config import TargetSet
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context, Input, Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.stages.write_shards import IMAGES
from lodeset.pruning.choosing.variants import METHODS
from lodeset.pruning.config import Job, Learned, LotteryJob, PruneJob, SelfMaskingJob, run_of
from lodeset.pruning.jobs.recover import METHODS as RECOVERED
from lodeset.pruning.jobs.setting import VERSION, Done, Setting, Workplace
from lodeset.pruning.jobs.sweep import sweep
from lodeset.pruning.jobs.sweep_parts import PROBED, images_per_part
from lodeset.pruning.jobs.trained import draw_tickets, learn_all, trainings
from lodeset.training import cost
from lodeset.training.checkpoint import MARKER
from lodeset.training.config import TrainingConfig
from lodeset.training.labelled import read_target
from lodeset.training.origin import Origin

STAGE = "prune"
SECONDS_A_VARIANT = 1.4  # the demo's 18 variants, moments and solutions included, 2 CPU cores


def build(
    jobs: Sequence[Job],
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
        work=sum(_variants(job, configs[job.checkpoint]) for job in jobs),
        size_bytes=sum(_stored_bytes(job, configs[job.checkpoint]) for job in jobs),
    )
    return {stage.id: stage}


def _variants(job: Job, training: TrainingConfig) -> int:
    """How long a job takes, in variants of a sweep."""
    if isinstance(job, PruneJob):
        seconds = _recovery_seconds(job, training) + _looks(job, training.model.depth) * cost.forward_seconds(training)
        return len(job.points) * len(METHODS) + round(seconds / SECONDS_A_VARIANT)
    assert isinstance(job, Learned)
    seconds = trainings(job) * job.steps * job.batch * cost.seconds_per_image(training)
    return max(1, round(seconds / SECONDS_A_VARIANT))


def _looks(job: PruneJob, depth: int) -> int:
    """How often an image is seen beyond the one pass for moments, which the seconds of a variant hold: to weigh what every strength of every group
    changes alone, and behind the layers pruned before, for each layer of each model (in two networks, each half of the way on average).
    """
    layers = depth * len(job.targets)
    weighed = layers * len(job.sweep) * min(PROBED, job.calibration_images) if job.remove else 0
    in_turn = len(METHODS) + job.solved_in_turn if job.mode == "sequential" else 0
    return weighed + layers * len(job.points) * in_turn * job.calibration_images


def _recovery_seconds(job: PruneJob, dense: TrainingConfig) -> float:
    if job.recover is None:
        return 0.0
    run = run_of(dense, job.recover)
    teacher = dense if job.recover.how == "distill" else None
    return len(job.recovered) * len(RECOVERED) * run.steps * run.batch * cost.seconds_per_image(run, teacher)


def _stored_bytes(job: Job, training: TrainingConfig) -> int:
    """The moments of every part (float64: inputs x inputs, inputs x outputs), the weights of every solution, and a model a variant, whole at
    the most.
    """
    whole = cost.BYTES_A_WEIGHT * cost.backbone_parameters(training)
    if isinstance(job, LotteryJob):
        return 3 * trainings(job) * whole  # the weights, where they started, and the model
    if isinstance(job, SelfMaskingJob):
        return 2 * len(job.lr) * whole  # those at random beside them
    assert isinstance(job, PruneJob)
    model = training.model
    read = [{"units": model.hidden, "heads": model.dim}[target] for target in job.targets]
    parts = -(-job.calibration_images // images_per_part(job.calibration_images))
    moments = parts * model.depth * sum(n * (n + model.dim) * 8 for n in read)
    solutions = len(job.sweep) * model.depth * sum(n * model.dim * 8 for n in read)
    models = len(job.points) * len(METHODS) + len(job.recovered) * len(RECOVERED)
    checkpoints = 0 if job.recover is None else cost.stored_bytes(run_of(training, job.recover))  # of one run at a time
    return moments + solutions + models * whole + checkpoints


def run(context: Context) -> Outcome:
    store = context.store
    targets = tuple(
        read_target(store, context.inputs[f"images:{t.name}"], t.name, t.label, t.split)[0]
        for t in context.speed["targets"]
    )
    configs: Mapping[str, TrainingConfig] = context.speed["training"]
    folder = f"pruned/{context.fingerprint[:16]}"
    for name in configs:
        for file in (*context.inputs[name].tables["model"], *context.inputs["shards"].tables["index"]):
            store.check(file)  # what reads them looks at no digest
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
            config.crops,
            _checkpoint(store, context.inputs[name], config),
        )
        for name, config in configs.items()
    }
    done = []
    for number, job in enumerate(context.speed["jobs"]):
        basis = (context.inputs[job.checkpoint].fingerprint, context.inputs["shards"].content[IMAGES])
        done.append(run_job(context, settings[job.checkpoint], basis, job, number))
    reports = [one.report for one in done]
    report_file = _write_report(store, folder, context.fingerprint, reports)
    return Outcome(
        tables={"report": (report_file,), "models": tuple(file for one in done for file in one.models)},
        rows=Rows(taken=len(done), kept=len(done)),
        details={
            "jobs": reports,
            "parts": sum(one.parts for one in done),
            "parts_made": sum(one.parts_made for one in done),
            "folder": folder,
            "work": context.stage.work,
        },
    )


def _checkpoint(store: Store, trained: Artifact, config: TrainingConfig) -> Origin | None:
    """A run's last one, to go on from; artifacts of other hands need not have any."""
    files = trained.tables.get("checkpoints", ())
    marker = next((file for file in files if posixpath.basename(file.path) == MARKER), None)
    if marker is None:
        return None
    return Origin(path=posixpath.dirname(store.path(marker.path)), digest=marker.sha256, of=config)


def run_job(context: Context, setting: Setting, basis: tuple[str, str], job: Job, number: int) -> Done:
    """What a job leaves; `basis` is which model on which images.

    Raises:
        LodesetError: no image can be read, or the model cannot be used for it.
    """
    share = functools.partial(map_with_state, cpus=context.cpus, address=context.ray_address)
    work = Workplace(context, setting, share, basis)
    if isinstance(job, LotteryJob):
        return draw_tickets(work, job, number)
    if isinstance(job, SelfMaskingJob):
        return learn_all(work, job, number)
    assert isinstance(job, PruneJob)
    return sweep(work, job, number)


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
