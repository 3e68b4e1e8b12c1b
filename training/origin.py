"""What a run starts from: nothing, the weights of a backbone, or an earlier run's networks, to go on with or to learn from."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import Strict
from training.config import TrainingConfig
from training.ssl import Network, student_and_teacher
from training.vit import DinoVisionTransformer
from training.weights import load_weights


class Origin(Strict):
    """Networks that a run starts from.

    path: weights of a backbone (see `load_weights`), or the `state.pt` of an earlier run.
    digest: of these bytes; a checkpoint belongs to it.
    of: the configuration of that earlier run; none for a backbone alone.
    distil: its teacher stays as it is, and another student learns from it (DINOv2, section 5, "model distillation").
    """

    path: str
    digest: str
    of: TrainingConfig | None = None
    distil: bool = False


@dataclass(frozen=True)
class Networks:
    """`student` is trained towards what `teacher` says; `average` is the student's moving mean, and what a run is for.

    Teacher and average are one network, but when a larger one is distilled.
    """

    student: Network
    teacher: Network
    average: Network

    def to(self, device: torch.device) -> "Networks":
        student, average = self.student.to(device), self.average.to(device)
        return Networks(student, average if self.teacher is self.average else self.teacher.to(device), average)

    @property
    def distils(self) -> bool:
        return self.teacher is not self.average


def networks(config: TrainingConfig, origin: Origin | None) -> Networks:
    """The networks of a run's first step.

    Raises:
        LodesetError: the weights are not there, not readable or of another architecture.
    """
    student, average = student_and_teacher(config)
    if origin is None:
        return Networks(student, average, average)
    if origin.of is None:
        backbone = load_weights(origin.path, config.model)
        student.backbone = copy.deepcopy(backbone).train()
        average.backbone = backbone.requires_grad_(False)
        return Networks(student, average, average)
    state = torch.load(origin.path, map_location="cpu", weights_only=True)
    if origin.distil:
        teacher = Network(origin.of)
        teacher.load_state_dict(state["teacher"])
        return Networks(student, teacher.requires_grad_(False).eval(), average)
    for network, its in ((student, "student"), (average, "teacher")):
        network.load_state_dict(_on_grid_of(network.backbone, state[its]))
    return Networks(student, average, average)


def _on_grid_of(backbone: DinoVisionTransformer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors, with positions interpolated to those of `backbone`."""
    name = "backbone.pos_embed"
    side = backbone.image_size // backbone.config.patch_size
    return {**state, name: backbone.interpolated(state[name], side, side)}
