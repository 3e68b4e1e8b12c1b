"""DINOv2 (arXiv:2304.07193, section 4): DINO on images, iBOT on patches, KoLeo.

Its settings are those of the sections `heads`, `masking`, `losses` and `teacher`.

Shapes: b images on this worker, L local crops, N patches a global crop, M masked patches, D width, K prototypes.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lodeset.training.augment import normalised
from lodeset.training.config import TrainingConfig
from lodeset.training.data import Batch
from lodeset.training.heads import DinoHead
from lodeset.training.losses.centering import centred
from lodeset.training.losses.dino import dino_loss
from lodeset.training.losses.ibot import ibot_loss
from lodeset.training.losses.koleo import koleo_loss
from lodeset.training.losses.sinkhorn import sinkhorn_knopp
from lodeset.training.objectives.objective import Objective, ObjectiveConfig, Views
from lodeset.training.schedules import StepValues
from lodeset.training.ssl import Networks, StepLosses


class DinoV2Config(ObjectiveConfig):
    """The default; nothing to set beside the sections above."""

    kind: Literal["dinov2"] = "dinov2"


class Centers(nn.Module):
    """Moving means of a teacher's scores of images and of patches, [K] each: what softmax centring takes off."""

    cls: Tensor
    patch: Tensor

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("cls", torch.zeros(prototypes))
        self.register_buffer("patch", torch.zeros(prototypes))


def heads(config: TrainingConfig) -> Mapping[str, nn.Module]:
    """One for CLS and one for patches; tied heads are one module under two names."""
    said, dim = config.heads, config.network.dim
    dino = DinoHead(dim, said.hidden, said.dino_bottleneck, said.prototypes)
    ibot = dino if said.tied else DinoHead(dim, said.hidden, said.ibot_bottleneck, said.prototypes)
    return {"dino_head": dino, "ibot_head": ibot}


def buffers(config: TrainingConfig) -> Mapping[str, nn.Module]:
    return {"centers": Centers(config.heads.prototypes)}


def losses(
    nets: Networks,
    batch: Batch,
    values: StepValues,
    config: TrainingConfig,
    group: dist.ProcessGroup | None,
) -> StepLosses:
    """The forward pass of a step; `group` are the processes over which the teacher's scores are centred and KoLeo looks for neighbours.

    In distillation the student sees the patches that the iBOT term asks for.
    """
    student, teacher = nets.student, nets.teacher
    weights, temperature = config.losses, values.teacher_temperature
    global_crops, local_crops = (normalised(crops) for crops in batch.crops(config.crops))
    mixed = torch.autocast(batch.masks.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")

    with torch.no_grad(), mixed:
        (seen,) = teacher.backbone.forward_groups([(global_crops, None)])  # cls [2 b, D], patches [2 b, N, D]
        teacher_cls_scores = teacher.head("dino_head")(seen.cls)  # [2 b, K]
        teacher_patch_scores = teacher.head("ibot_head")(seen.patches[batch.masks])  # [M, K]
    if weights.centering == "sinkhorn":
        cls_targets = sinkhorn_knopp(teacher_cls_scores, temperature, weights.sinkhorn_iterations, group)
        patch_targets = sinkhorn_knopp(teacher_patch_scores, temperature, weights.sinkhorn_iterations, group)
    else:
        keep = weights.center_momentum
        cls_targets = centred(teacher_cls_scores, nets.buffers.get_buffer("centers.cls"), temperature, keep, group)
        patch_targets = centred(
            teacher_patch_scores, nets.buffers.get_buffer("centers.patch"), temperature, keep, group
        )

    images, locals_ = len(batch.image_ids), config.crops.local_count
    with mixed:
        crops: list[tuple[Tensor, Tensor | None]] = [(global_crops, None if nets.distils else batch.masks)]
        if locals_:
            crops.append((local_crops, None))
        whole, *parts = student.backbone.forward_groups(crops)  # cls [2 b, D], patches [2 b, N, D]; cls [L b, D]
        scores = student.head("dino_head")(torch.cat([whole.cls, *(part.cls for part in parts)]))  # [(2 + L) b, K]
        patch_scores = student.head("ibot_head")(whole.patches[batch.masks])  # [M, K]

    targets = cls_targets.view(2, images, -1)  # [2, b, K]
    of_views = scores.view(2 + locals_, images, -1)
    dino = dino_loss(of_views[:2], targets, weights.student_temperature, skip_same_view=True)  # 2 pairs of views
    pairs = 2
    if locals_:
        dino = dino + dino_loss(of_views[2:], targets, weights.student_temperature, skip_same_view=False)  # 2 L pairs
        pairs += 2 * locals_

    koleo = sum((koleo_loss(cls, group) for cls in whole.cls.chunk(2)[: weights.koleo_crops]), whole.cls.new_zeros(()))
    return StepLosses(
        terms={
            "dino": weights.dino * dino / pairs,
            "ibot": weights.ibot * ibot_loss(patch_scores, patch_targets, batch.masks, weights.student_temperature),
            "koleo": weights.koleo * koleo,
        },
        teacher_cls=seen.cls.float(),
        teacher_targets=cls_targets,
        student_cls=whole.cls.detach().float(),
    )


DINOV2 = Objective(
    config=DinoV2Config,
    views=Views(local_crops=True, masks=True),
    has_teacher=True,
    heads=heads,
    losses=losses,
    terms=("dino", "ibot", "koleo"),
    buffers=buffers,
)
