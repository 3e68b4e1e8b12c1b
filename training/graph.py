"""The training half of the DAG: shards -> `train` -> `finish` -> `distill`, as far as configured, and `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lodeset.pipeline.config import TargetSet
from lodeset.pipeline.dag.stage import Input, Stage, deferred
from lodeset.pipeline.specs import METADATA, SHARDS
from lodeset.training import cost
from lodeset.training.config import TrainingConfig, distilling, finishing
from lodeset.training.specs import SELECTED, EvaluateRuntime, EvaluateSpec, TrainRuntime, TrainSpec

LONGER = "from the first step on (`training.weights` goes on from a model instead)"
EVALUATED = 0.3  # two networks' features of an image, as a share of a training image's time: the demo, 2 CPU cores


def build(
    config: TrainingConfig | None, targets: Sequence[TargetSet], curation: Mapping[str, Stage], max_pixels: int
) -> dict[str, Stage]:
    """`train`, where it is configured, and `evaluate`, where there are target sets.

    `max_pixels` is the limit that the target sets' images were ingested with; `training` has its own for what it trains on.
    """
    stages: dict[str, Stage] = {}
    training: dict[str, Stage[TrainSpec, TrainRuntime]] = {}
    if config is not None:
        data = {"shards": Input(curation["write_shards/all"], SHARDS)}
        if config.mix:
            data[SELECTED] = Input(curation["retrieve/all"])
        training = _trainings(config, data)
    stages |= {stage.id: stage for stage in training.values()}
    if targets:
        evaluate = Stage(
            "evaluate",
            "all",
            EvaluateSpec.VERSION,
            "ray",
            deferred("lodeset.training.stages.evaluate:run"),
            spec=EvaluateSpec(targets=tuple(targets)),
            inputs={
                **{name: Input(stage) for name, stage in training.items()},
                **{f"images:{t.name}": Input(curation[f"ingest/{t.name}"], METADATA) for t in targets},
                **{f"vectors:{t.name}": Input(curation[f"embed/{t.name}"]) for t in targets},
            },
            runtime=EvaluateRuntime(
                training={name: stage.spec for name, stage in training.items()}, max_pixels=max_pixels
            ),
            seconds_per_image=EVALUATED * cost.seconds_per_image(config) if config is not None else 0.0,
        )
        stages[evaluate.id] = evaluate
    return stages


def alone(config: TrainingConfig, shards: Stage, index: tuple[str, ...]) -> dict[str, Stage]:
    """`train`, `finish` and `distill`, as far as configured, on shards that are there already; each in a folder of its name.

    `shards` is a stage whose artifact is given to the run; `index` are their index files.
    """
    made = _trainings(config, {"shards": Input(shards, SHARDS)})
    placed: dict[str, Stage] = {}
    for name, stage in made.items():
        inputs = {role: replace(one, stage=placed.get(one.stage.id, one.stage)) for role, one in stage.inputs.items()}
        runtime = replace(stage.runtime, index=index, folder=name)
        placed[stage.id] = replace(stage, inputs=inputs, runtime=runtime)
    return placed


def _trainings(config: TrainingConfig, data: Mapping[str, Input]) -> dict[str, Stage[TrainSpec, TrainRuntime]]:
    stages = {"train": _training("train", config, data)}
    last = stages["train"]
    if config.finish is not None:
        stages["finish"] = last = _training("finish", finishing(config), data, last)
    if config.distill is not None:
        stages["distill"] = _training("distill", distilling(config), data, last)
    return stages


def _training(
    name: str, config: TrainingConfig, data: Mapping[str, Input], before: Stage[TrainSpec, TrainRuntime] | None = None
) -> Stage[TrainSpec, TrainRuntime]:
    """A run of `config` on `data`, from the networks of the stage `before`: `distill` learns from them, others go on with them."""
    weights = None
    if config.weights is not None:
        from lodeset.training.weights import check_weights, identity  # loads torch

        check_weights(config.weights.path, config.model)  # now, not when days of curation are over
        weights = identity(config.weights.path)
    of = before.spec.config if before is not None else None
    return Stage(
        name,
        "all",
        TrainSpec.VERSION,
        "ray",
        deferred("lodeset.training.stages.train:run"),
        spec=TrainSpec(config=config, weights=weights),
        inputs={**data, **({"before": Input(before)} if before is not None else {})},
        runtime=TrainRuntime(before=of),
        seconds_per_image=cost.seconds_per_image(config, teacher=of if name == "distill" else None),
        work=config.steps * config.batch,
        size_bytes=cost.stored_bytes(config),
        advice={"steps": LONGER} if name == "train" and config.weights is None else {},
    )
