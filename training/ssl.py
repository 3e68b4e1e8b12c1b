"""One step of DINOv2 (arXiv:2304.07193, section 4).

Shapes: b images on this worker, L local crops, N patches a global crop, M masked patches, D width, K prototypes.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lodeset.training.augment import normalised
from lodeset.training.config import OptimiserConfig, TrainingConfig
from lodeset.training.data import Batch
from lodeset.training.heads import DinoHead
from lodeset.training.losses.centering import centred
from lodeset.training.losses.dino import dino_loss
from lodeset.training.losses.ibot import ibot_loss
from lodeset.training.losses.koleo import koleo_loss
from lodeset.training.losses.sinkhorn import sinkhorn_knopp
from lodeset.training.schedules import StepValues
from lodeset.training.vit import DinoVisionTransformer


class Network(nn.Module):
    """A backbone with its two heads; student and teacher are one each. Tied heads are one module under two names."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        heads, dim = config.heads, config.model.dim
        self.backbone = DinoVisionTransformer(config.model, config.crops.global_size)
        self.dino_head = DinoHead(dim, heads.hidden, heads.dino_bottleneck, heads.prototypes)
        self.ibot_head = (
            self.dino_head if heads.tied else DinoHead(dim, heads.hidden, heads.ibot_bottleneck, heads.prototypes)
        )


class Centers(nn.Module):
    """Moving means of a teacher's image and patch scores, [K] each, which softmax centering subtracts."""

    cls: Tensor
    patch: Tensor

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("cls", torch.zeros(prototypes))
        self.register_buffer("patch", torch.zeros(prototypes))


@dataclass(frozen=True)
class Networks:
    """`student` is trained to match `teacher`; `average` is the student's moving mean, and the result of a run.

    Teacher and average are the same network unless a larger one is distilled. `centers` are those of the teacher's
    scores.
    """

    student: Network
    teacher: Network
    average: Network
    centers: Centers

    def to(self, device: torch.device) -> "Networks":
        average = self.average.to(device)
        teacher = self.teacher.to(device) if self.distils else average
        return Networks(self.student.to(device), teacher, average, self.centers.to(device))

    @property
    def distils(self) -> bool:
        return self.teacher is not self.average


def fresh(config: TrainingConfig) -> Networks:
    """The networks of a run that starts from scratch."""
    student, teacher = student_and_teacher(config)
    return Networks(student, teacher, teacher, Centers(config.heads.prototypes))


@dataclass(frozen=True)
class StepLosses:
    """The weighted terms whose sum is minimized, and intermediate results for the metrics."""

    terms: dict[str, Tensor]
    teacher_cls: Tensor  # [2 b, D]
    teacher_targets: Tensor  # [2 b, K], probabilities
    student_cls: Tensor  # [2 b, D]

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()


def student_and_teacher(config: TrainingConfig) -> tuple[Network, Network]:
    """A freshly initialized student (seeded: the same on every worker), and a teacher that starts as its copy."""
    torch.manual_seed(config.seed)
    student = Network(config)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    return student.train(), teacher


def losses(
    nets: Networks,
    batch: Batch,
    teacher_temperature: float,
    config: TrainingConfig,
    group: dist.ProcessGroup | None,
) -> StepLosses:
    """The forward pass of a step; `group`: the processes over which the teacher's scores are centered and KoLeo
    searches neighbors.

    In distillation the student sees the patches that the iBOT term is computed on.
    """
    student, teacher, centers = nets.student, nets.teacher, nets.centers
    weights = config.losses
    global_crops, local_crops = (normalised(crops) for crops in batch.crops(config.crops))
    mixed = torch.autocast(batch.masks.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")

    with torch.no_grad(), mixed:
        (seen,) = teacher.backbone.forward_groups([(global_crops, None)])  # cls [2 b, D], patches [2 b, N, D]
        teacher_cls_scores = teacher.dino_head(seen.cls)  # [2 b, K]
        teacher_patch_scores = teacher.ibot_head(seen.patches[batch.masks])  # [M, K]
    if weights.centering == "sinkhorn":
        cls_targets = sinkhorn_knopp(teacher_cls_scores, teacher_temperature, weights.sinkhorn_iterations, group)
        patch_targets = sinkhorn_knopp(teacher_patch_scores, teacher_temperature, weights.sinkhorn_iterations, group)
    else:
        keep = weights.center_momentum
        cls_targets = centred(teacher_cls_scores, centers.cls, teacher_temperature, keep, group)
        patch_targets = centred(teacher_patch_scores, centers.patch, teacher_temperature, keep, group)

    images, locals_ = len(batch.image_ids), config.crops.local_count
    with mixed:
        crops: list[tuple[Tensor, Tensor | None]] = [(global_crops, None if nets.distils else batch.masks)]
        if locals_:
            crops.append((local_crops, None))
        whole, *parts = student.backbone.forward_groups(crops)  # cls [2 b, D], patches [2 b, N, D]; cls [L b, D]
        scores = student.dino_head(torch.cat([whole.cls, *(part.cls for part in parts)]))  # [(2 + L) b, K]
        patch_scores = student.ibot_head(whole.patches[batch.masks])  # [M, K]

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


@torch.no_grad()
def update_teacher(student: Network, teacher: Network, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student."""
    torch._foreach_lerp_(_held(teacher), _held(student), 1 - momentum)


def _held(network: Network) -> list[Tensor]:
    """A network's parameters, or the shards of them that this worker holds."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]


def make_optimiser(student: Network, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW with one parameter group for each combination of learning-rate factor, weight decay and being a prototype
    layer.

    The learning rate falls by `layer_decay` per block from the last one down, and additionally by `patch_embed_lr` at
    the patch embedding; biases, norms and LayerScale gains do not decay (DINOv2, table 16).
    """
    depth = len(student.backbone.blocks)
    grouped: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        factor = config.layer_decay ** (depth + 1 - _layer(name, depth))
        if name.startswith("backbone.patch_embed."):
            factor *= config.patch_embed_lr
        decays = not (name.endswith((".bias", ".gamma")) or ".norm" in name)
        grouped.setdefault((factor, decays, name.endswith(".prototypes")), []).append(parameter)
    optimiser = torch.optim.AdamW(
        [
            {"params": parameters, "lr_factor": factor, "decays": decays, "prototypes": prototypes}
            for (factor, decays, prototypes), parameters in grouped.items()
        ],
        betas=(0.9, 0.999),
        fused=True,
    )
    # Create the state that the first step would create: a checkpoint is read into it.
    for parameter in student.parameters():
        optimiser.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimiser


def training_state(nets: Networks, optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
    """Everything that a step changes, by name: `student.`, `teacher.` (the moving mean), `centers.`,
    `optimiser.<which>.`; the tensors themselves, each once.
    """
    student = dict(nets.student.named_parameters())
    moments = {name: optimiser.state[parameter] for name, parameter in student.items()}
    return {
        **{f"student.{name}": parameter.detach() for name, parameter in student.items()},
        **{f"teacher.{name}": parameter.detach() for name, parameter in nets.average.named_parameters()},
        **{f"centers.{name}": center for name, center in nets.centers.named_buffers()},
        **{f"optimiser.{which}.{name}": tensor for name, state in moments.items() for which, tensor in state.items()},
    }


def _layer(name: str, depth: int) -> int:
    """0 for the embeddings, 1 to depth for the blocks, depth + 1 for the final norm and the heads."""
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1 if name.startswith(("backbone.norm.", "dino_head.", "ibot_head.")) else 0


def schedule(optimiser: torch.optim.AdamW, values: StepValues) -> None:
    """Set the learning rate and weight decay of every parameter group for one step."""
    for parameters in optimiser.param_groups:
        lr = values.prototypes_lr if parameters["prototypes"] else values.lr
        parameters["lr"] = lr * parameters["lr_factor"]
        parameters["weight_decay"] = values.weight_decay if parameters["decays"] else 0.0


def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, world_size: int) -> None:
    """Average the gradients over all processes with one flat all-reduce.

    DistributedDataParallel would overlap this with the backward pass, but it reorders its buckets after the first step
    and thereby the order of sums: a resumed run would differ in the last bits from an uninterrupted one.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    flat /= world_size
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def clip_gradients(student: Network, largest: float) -> float:
    """Clip each submodule (backbone and each head) to the norm `largest`; return the norm of all before clipping."""
    norms = [nn.utils.clip_grad_norm_(part.parameters(), largest) for part in student.children()]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
