"""What an objective of self-supervised training is. `lodeset.training.objectives` lists them; a plan reads this without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import ConfigDict

from lodeset.pipeline.strict import Strict

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import nn

    from lodeset.training.config import TrainingConfig
    from lodeset.training.data import Batch
    from lodeset.training.schedules import StepValues
    from lodeset.training.ssl import Networks, StepLosses


class ObjectiveConfig(Strict):
    """The keys that every objective has; each kind adds its own."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})
    kind: str


@dataclass(frozen=True, kw_only=True)
class Views:
    """What an objective looks at beside the two global crops of each image."""

    local_crops: bool
    masks: bool  # which patches of the global crops are hidden


class Modules(Protocol):
    def __call__(self, config: TrainingConfig) -> Mapping[str, nn.Module]:
        """Modules by name, on the CPU, drawn from torch's generator as it stands."""


class Losses(Protocol):
    def __call__(
        self,
        nets: Networks,
        batch: Batch,
        values: StepValues,
        config: TrainingConfig,
        group: dist.ProcessGroup | None,
    ) -> StepLosses:
        """The forward pass of a step on this worker's batch; `group` are the processes that share the step, if there are several.

        Gradients are averaged over the processes by the loop.
        """


def nothing(config: TrainingConfig) -> Mapping[str, nn.Module]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a network is trained to do.

    Attributes:
        config: its settings, with a `kind` that is its name in `OBJECTIVES`.
        views: what it looks at.
        has_teacher: a moving mean of the student gives the targets, and is what a run is for. Without one the student is.
        heads: what the student (and a teacher) has on top of its backbone. `prototypes` parameters stand still at first, see
            `optimiser.freeze_last_layer`.
        losses: one step.
        terms: the names of the terms that `losses` returns; metrics, the summary and the report show them.
        buffers: what else a step changes, in the buffers of these modules. Checkpoints hold them, as they hold parameters.
    """

    config: type[ObjectiveConfig]
    views: Views
    has_teacher: bool
    heads: Modules
    losses: Losses
    terms: Sequence[str]
    buffers: Modules = nothing
