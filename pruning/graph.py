"""The pruning half of the DAG: checkpoint + calibration images -> `prune`, job after job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lodeset.pipeline.config import Ingest, TargetSet
from lodeset.pipeline.dag.stage import Input, Stage, deferred
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.specs import METADATA, SHARDS
from lodeset.pruning.choosing.criteria import METHODS, REFITTED
from lodeset.pruning.config import Job, Learned, LotteryJob, PruneJob, SelfMaskingJob, run_of
from lodeset.pruning.specs import PROBED, Dense, PruneRuntime, PruneSpec, images_per_part, trainings
from lodeset.training import cost
from lodeset.training.config import TrainingConfig
from lodeset.training.specs import TrainSpec

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
    specs: dict[str, TrainSpec] = {name: above[f"{name}/all"].spec for name in trained}
    configs = {name: spec.config for name, spec in specs.items()}
    for name, config in configs.items():
        if config.backbone is not None:
            raise ConfigError(
                f"pruning: the model of {name} is a {config.backbone.kind}, and only pruned Vision Transformers can be "
                "stored: remove `pruning`, or `training.backbone`"
            )
    stage = Stage(
        STAGE,
        "all",
        PruneSpec.VERSION,
        "ray",
        deferred("lodeset.pruning.jobs.run:run"),
        spec=PruneSpec(jobs=tuple(jobs), targets=tuple(targets)),
        inputs={
            **{name: Input(above[f"{name}/all"]) for name in trained},
            "shards": Input(above["write_shards/all"], SHARDS),
            **{f"images:{t.name}": Input(above[f"ingest/{t.name}"], METADATA) for t in targets},
        },
        runtime=PruneRuntime(training=specs, max_pixels=max_pixels),
        seconds_per_image=SECONDS_A_VARIANT,
        work=sum(_variants(job, configs[job.checkpoint]) for job in jobs),
        size_bytes=sum(_stored_bytes(job, configs[job.checkpoint]) for job in jobs),
    )
    return {stage.id: stage}


def alone(
    job: Job, dense: Dense, model: Stage, shards: Stage, labeled: Stage | None, target: TargetSet | None
) -> Stage:
    """`prune` of a model that is there already, on shards that are there already.

    `model` and `shards` are stages whose artifacts are given to the run; `labeled` ingests the images of `target`.
    """
    judged = {f"images:{target.name}": Input(labeled, METADATA)} if target is not None and labeled is not None else {}
    return Stage(
        STAGE,
        "all",
        PruneSpec.VERSION,
        "ray",
        deferred("lodeset.pruning.jobs.run:run"),
        spec=PruneSpec(jobs=(job,), targets=() if target is None else (target,)),
        inputs={job.checkpoint: Input(model), "shards": Input(shards, SHARDS), **judged},
        runtime=PruneRuntime(training={}, max_pixels=Ingest().max_pixels, dense=dense),
    )


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
    return len(job.recovered) * len(REFITTED) * run.steps * run.batch * cost.seconds_per_image(run, teacher)


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
    models = len(job.points) * len(METHODS) + len(job.recovered) * len(REFITTED)
    checkpoints = 0 if job.recover is None else cost.stored_bytes(run_of(training, job.recover))  # of one run at a time
    return moments + solutions + models * whole + checkpoints
