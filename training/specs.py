"""The definition of each stage of training, and how it runs (see `lodeset.pipeline.specs`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lodeset.pipeline.config import TargetSet
from lodeset.training.config import TrainingConfig, identity_of

SELECTED = "selected"  # the input that lists the sets of each image, if sets are weighted


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """A training run; `weights` is the digest of the file that it starts from."""

    VERSION: ClassVar[int] = 4
    config: TrainingConfig
    weights: str | None = None

    def identity(self) -> Mapping[str, Any]:
        tree = identity_of(self.config)
        return tree if self.weights is None else {**tree, "weights": self.weights}


@dataclass(frozen=True, kw_only=True)
class TrainRuntime:
    """How a run starts and, for training alone, where its images and results are.

    Attributes:
        before: the configuration of the run whose networks this one starts or learns from.
        index: the index files of the shards, if no stage of the store wrote them.
        folder: folder of checkpoints and the model, relative to the store; by default `training/<fingerprint>`.
    """

    before: TrainingConfig | None = None
    index: tuple[str, ...] = ()
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainDetails:
    """The location of a run's checkpoints, metrics and exported model, relative to the store."""

    folder: str


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    VERSION: ClassVar[int] = 3
    targets: Sequence[TargetSet]

    def identity(self) -> Mapping[str, Any]:
        chosen = {"name", "label", "split", "linear_steps"}
        return {"targets": [target.model_dump(include=chosen) for target in self.targets]}


@dataclass(frozen=True, kw_only=True)
class EvaluateRuntime:
    """`training` holds the specification of each stage that trains, by name; images are decoded up to `max_pixels`."""

    training: Mapping[str, TrainSpec]
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class EvaluateDetails:
    targets: Mapping[str, Mapping[str, Any]]
