"""What a step of self-supervised training works on, whatever its objective: networks, gradients, the optimiser, the moving mean.

Shapes: b images on this worker, D width, K values a target.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lodeset.pipeline.references import resolved
from lodeset.training.backbone import Backbone, made
from lodeset.training.config import OptimiserConfig, TrainingConfig
from lodeset.training.objectives import DEFAULT, OBJECTIVES
from lodeset.training.objectives.objective import Objective
from lodeset.training.schedules import StepValues


class Network(nn.Module):
    """A backbone with the heads of an objective; student and teacher are one each."""

    backbone: Backbone

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.backbone = made(config.network, config.crops.global_size)
        for name, head in objective_of(config).heads(config).items():
            self.add_module(name, head)

    def head(self, name: str) -> nn.Module:
        return self.get_submodule(name)

    def heads(self) -> list[nn.Module]:
        """Each once, whatever names it has."""
        return [module for name, module in self.named_children() if name != "backbone"]


@dataclass(frozen=True, kw_only=True)
class Networks:
    """`student` is trained to match `teacher`; `average` is the student's moving mean, and the result of a run.

    Teacher and average are the same network unless a larger one is distilled. With an objective that has no teacher, all
    three are the student. `buffers` holds what else a step changes.
    """

    student: Network
    teacher: Network
    average: Network
    buffers: nn.ModuleDict

    def to(self, device: torch.device) -> "Networks":
        student = self.student.to(device)
        average = self.average.to(device)
        teacher = self.teacher.to(device) if self.distils else average
        return Networks(student=student, teacher=teacher, average=average, buffers=self.buffers.to(device))

    @property
    def distils(self) -> bool:
        return self.teacher is not self.average

    @property
    def averages(self) -> bool:
        """Whether there is a moving mean."""
        return self.average is not self.student


def objective_of(config: TrainingConfig) -> Objective:
    found: Objective = resolved(OBJECTIVES[DEFAULT if config.objective is None else config.objective.kind])
    return found


def fresh(config: TrainingConfig) -> Networks:
    """The networks of a run that starts from scratch."""
    objective = objective_of(config)
    student, teacher = student_and_teacher(config)
    if not objective.has_teacher:
        teacher = student
    buffers = nn.ModuleDict(objective.buffers(config))
    return Networks(student=student, teacher=teacher, average=teacher, buffers=buffers)


@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """The weighted terms whose sum is minimized, and intermediate results for the metrics, without gradients."""

    terms: dict[str, Tensor]
    teacher_cls: Tensor  # [2 b, D], of the student where there is no teacher
    teacher_targets: Tensor | None  # [2 b, K], probabilities; None: the objective has none
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
    the patch embedding; biases, norms and LayerScale gains, which have one dimension, do not decay (DINOv2, table 16).
    """
    backbone = student.backbone
    grouped: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        own = name.removeprefix("backbone.")
        layer = backbone.layer_of(own) if own != name else backbone.config.depth + 1  # heads are above the backbone
        factor = config.layer_decay ** (backbone.config.depth + 1 - layer)
        if own.startswith("patch_embed."):
            factor *= config.patch_embed_lr
        decays = parameter.ndim > 1
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
    """Everything that a step changes, by name: `student.`, `teacher.` (the moving mean, if there is one), the
    objective's buffers, `optimiser.<which>.`; the tensors themselves, each once.
    """
    student = dict(nets.student.named_parameters())
    moments = {name: optimiser.state[parameter] for name, parameter in student.items()}
    return {
        **_named("student.", nets.student),
        **(_named("teacher.", nets.average) if nets.averages else {}),
        **dict(nets.buffers.named_buffers()),
        **{f"optimiser.{which}.{name}": tensor for name, state in moments.items() for which, tensor in state.items()},
    }


def _named(prefix: str, network: Network) -> dict[str, Tensor]:
    """Parameters, and what BatchNorms and the like keep."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    return {f"{prefix}{name}": tensor.detach() for name, tensor in tensors}


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
