"""The whole configuration file: curation, training, pruning."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from fsspec.utils import get_protocol
from pydantic import Field, ValidationError, model_validator

from lodeset.infra.dashboard.config import Inspect
from lodeset.infra.deploy.config import Deploy
from lodeset.infra.gates.config import Gate, problem
from lodeset.infra.observing.config import Hook
from lodeset.pipeline.config import CurationConfig, load, merged
from lodeset.pipeline.shorthand import written_out
from lodeset.pruning.config import AnyJob, LotteryJob, PruneJob, run_of
from lodeset.training.config import TrainingConfig, distilling, finishing


class Config(CurationConfig):
    """The configuration of a run. Without `training`, a run ends with the shards."""

    training: TrainingConfig | None = Field(
        None, description="DINOv2 pretraining on the shards [default: curation only]"
    )
    pruning: tuple[AnyJob, ...] = Field((), description="sparsification jobs on the trained model")
    deploy: Deploy | None = Field(None, description="where and when it runs by itself; changes no result")
    gates: tuple[Gate, ...] = Field(
        (), description="what every finished run must fulfill; they change nothing that a run makes"
    )

    notify: tuple[Hook, ...] = Field((), description="whom to tell that a run ended, failed or has stalled")
    inspect: Inspect = Field(default_factory=Inspect, description="what `lodeset inspect` makes")
    lineage: bool = Field(
        False,
        description="whether OpenLineage events are emitted, by the client's own settings (OPENLINEAGE_URL, openlineage.yml)",
    )

    @model_validator(mode="after")
    def _gates_make_sense(self) -> Config:
        why = problem(self.gates, self)
        if why is not None:
            raise ValueError(why)
        return self

    @model_validator(mode="after")
    def _stores_where_other_processes_look(self) -> Config:
        if get_protocol(self.store) == "memory":
            raise ValueError(
                f"store {self.store}: this is the memory of one process, and a run has several: use a path, or the URL "
                "of a bucket"
            )
        return self

    @model_validator(mode="after")
    def _weighs_sets_that_are_there(self) -> Config:
        known = [curated.name for curated in self.curated]
        for name in self.training.mix if self.training is not None else ():
            if name not in known:
                raise ValueError(
                    f"training.mix.{name}: no curated set has this name: {', '.join(known) or 'there is none'}"
                )
        return self

    @model_validator(mode="after")
    def _prunes_what_is_trained(self) -> Config:
        if not self.pruning:
            return self
        if self.training is None:
            raise ValueError("pruning: needs a trained model: add `training: {recipe: tiny}`, or remove `pruning`")
        runs = {"train": self.training}
        if self.training.finish is not None:
            runs["finish"] = finishing(self.training)
        if self.training.distill is not None:
            runs["distill"] = distilling(self.training)
        for number, job in enumerate(self.pruning):
            if job.checkpoint not in runs:
                raise ValueError(
                    f"pruning.{number}.checkpoint {job.checkpoint}: no stage makes it: add "
                    f"`training.{job.checkpoint}`, or use {' or '.join(runs)}"
                )
            self._labels_are_there(number, job)
            if not isinstance(job, PruneJob):
                continue
            if job.recover is not None:
                try:
                    run_of(runs[job.checkpoint], job.recover)
                except ValueError as error:
                    details = error.errors() if isinstance(error, ValidationError) else [{"msg": str(error)}]
                    why = "; ".join(str(detail["msg"]).removeprefix("Value error, ") for detail in details)
                    raise ValueError(f"pruning.{number}.recover: {why}") from None
            model, crops = runs[job.checkpoint].model, runs[job.checkpoint].crops
            if job.targets == ("heads",) and model.heads == 1:
                raise ValueError(f"pruning.{number}.targets heads: the model has a single attention head: add units")
            tokens = (crops.global_size // model.patch_size) ** 2 + 1 + model.registers
            # More positions than unknowns: a layer's inputs and the bias.
            read = model.hidden if "units" in job.targets else model.dim
            needed = read + 2
            drawn = min(job.positions_per_image or tokens, tokens)
            if job.calibration_images * drawn < needed:
                raise ValueError(
                    f"pruning.{number}.calibration_images {job.calibration_images}: {drawn} positions of each image "
                    f"cannot determine the {read} inputs of a layer (its model's dim is {model.dim}): "
                    f"use calibration_images {-(-needed // drawn)} or more"
                )
        return self

    def _labels_are_there(self, number: int, job: AnyJob) -> None:
        """Raise ValueError if a job needs labels or a target set that do not exist."""
        known = [target.name for target in self.targets]
        if isinstance(job, PruneJob):
            return
        if job.target is not None and job.target not in known:
            existing = ", ".join(known) or "existing is none"
            raise ValueError(f"pruning.{number}.target {job.target}: no target set has this name: {existing}")
        from_labels = "labels" in job.tasks if isinstance(job, LotteryJob) else job.task == "labels"
        if from_labels and not known:
            raise ValueError(
                f"pruning.{number}: labels come from a target set: add `targets`, or choose a task without labels"
            )


def read(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a configuration file; raises ConfigError, which names the key, the value and what is allowed."""
    return load(Config, path, overrides)


def said(config: Config, path: str | Path, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the file and the overrides say, for another machine: without abbreviations, and with absolute paths.

    What they do not say stays away, because a recipe or another section may give it, and some keys are refused where
    nothing reads them. The section `deploy` is this machine's business.
    """
    whole = config.model_dump(mode="json", exclude={"deploy"})
    raw = written_out({"name": config.name, "store": config.store, **merged(Config, path, overrides)})
    told: dict[str, Any] = _said(raw, whole)
    return told


def _said(raw: Any, whole: Any) -> Any:
    """What `raw` says, in the words of the whole."""
    if isinstance(raw, dict) and isinstance(whole, dict):
        return {key: _said(raw[key], value) for key, value in whole.items() if key in raw}
    if isinstance(raw, list) and isinstance(whole, list) and len(raw) == len(whole):
        return [_said(*pair) for pair in zip(raw, whole, strict=True)]
    return whole


def cpus_of(config: Config) -> int:
    """The budget of cores: as configured, or all that this process may use."""
    return config.resources.cpus if config.resources.cpus != "auto" else usable_cpus()


def usable_cpus() -> int:
    """Number of cores that this process may use, within the limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cpu_limit(_CGROUP))))


_CGROUP = Path("/sys/fs/cgroup/cpu.max")  # inside a container, that of the container


def _cpu_limit(file: Path) -> float:
    """The cores that a control group may use."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf
