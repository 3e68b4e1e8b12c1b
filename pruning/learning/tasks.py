"""What a network is trained to do while masks of its weights are sought: tell labels or rotations apart, or see that two views are of
one image. A task is a loss, and has the head that it needs.

Features are what a network returns first, flattened. Both views of an image are used by every task: as two examples by those that look
at one at a time.

Shapes: b images, S side in pixels, D width of the features, C classes, K prototypes.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lodeset.pruning.units.groups import outputs_of
from lodeset.training.heads import DinoHead
from lodeset.training.losses.dino import dino_loss
from lodeset.training.losses.sinkhorn import sinkhorn_knopp
from lodeset.training.schedules import cosine

TaskName = Literal["labels", "rotation", "dino", "swav"]
Features = Callable[[Tensor], Tensor]  # normalised pixels [B, 3, S, S] -> [B, D]

# Of the heads of dino and swav: small, as the networks are that many rounds of training suit.
HIDDEN, BOTTLENECK = 256, 64
STUDENT_TEMPERATURE = 0.1
DINO_TEMPERATURE, DINO_PROTOTYPES, DINO_MOMENTUM = 0.04, 512, 0.99
SWAV_EPSILON = 0.05


def features_of(network: Callable[[Tensor], Any], pixels: Tensor) -> Tensor:
    """[B, D] of normalised pixels [B, 3, S, S]."""
    return outputs_of(network(pixels))[0].flatten(1)


class Task(nn.Module):
    """A loss of what a network makes of images, with its head."""

    def forward(self, features: Features, views: Tensor, codes: Tensor, rng: torch.Generator, share: float) -> Tensor:
        """A scalar. views: normalised [2, b, 3, S, S]; codes: classes [b] (none are -1); share of the steps that are done."""
        raise NotImplementedError

    def begin(self, network: nn.Module) -> None:
        """Called before the first step on a network."""

    def follow(self, network: nn.Module, share: float) -> None:
        """Called after every step."""


class Labels(Task):
    """Cross-entropy of a linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, features: Features, views: Tensor, codes: Tensor, rng: torch.Generator, share: float) -> Tensor:
        return F.cross_entropy(self.head(features(views.flatten(0, 1))), codes.repeat(2))


class Rotation(Task):
    """By how many quarter turns an image was rotated (Gidaris et al. 2018, arXiv:1803.07728); one draw a view, where they take all four."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 4)

    def forward(self, features: Features, views: Tensor, codes: Tensor, rng: torch.Generator, share: float) -> Tensor:
        pixels = views.flatten(0, 1)
        turns = torch.randint(4, (len(pixels),), generator=rng).to(pixels.device)
        turned = torch.empty_like(pixels)
        for k in range(4):
            turned[turns == k] = pixels[turns == k].rot90(k, dims=(2, 3))
        return F.cross_entropy(self.head(features(turned)), turns)


class Dino(Task):
    """Self-distillation of two whole views (Caron et al. 2021, arXiv:2104.14294), the teacher's scores centred by Sinkhorn-Knopp.

    Local views are left out: a network of any kind may take one size alone.
    """

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.head = DinoHead(width, HIDDEN, BOTTLENECK, DINO_PROTOTYPES)
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)

    def forward(self, features: Features, views: Tensor, codes: Tensor, rng: torch.Generator, share: float) -> Tensor:
        pixels, images = views.flatten(0, 1), views.shape[1]
        with torch.no_grad():
            scores = self.teacher_head(features_of(self.teacher, pixels))
            targets = sinkhorn_knopp(scores, DINO_TEMPERATURE).view(2, images, -1)
        student = self.head(features(pixels)).view(2, images, -1)
        return dino_loss(student, targets, STUDENT_TEMPERATURE, skip_same_view=True) / 2

    def begin(self, network: nn.Module) -> None:
        self.teacher.load_state_dict(network.state_dict())
        self.teacher_head.load_state_dict(self.head.state_dict())

    @torch.no_grad()
    def follow(self, network: nn.Module, share: float) -> None:
        momentum = cosine(round(share * 1000), 1000, DINO_MOMENTUM, 1.0)
        for teacher, student in ((self.teacher, network), (self.teacher_head, self.head)):
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
            for buffer, new in zip(teacher.buffers(), student.buffers(), strict=True):
                buffer.copy_(new)


class Outputs(Task):
    """The features that another network gives, which stays as it is: the mean square difference over their variance in the batch."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(teacher).requires_grad_(False).eval()

    def forward(self, features: Features, views: Tensor, codes: Tensor, rng: torch.Generator, share: float) -> Tensor:
        pixels = views.flatten(0, 1)
        with torch.no_grad():
            expected = features_of(self.teacher, pixels)
        return (features(pixels) - expected).square().mean() / expected.var(dim=0, correction=0).mean()


class Swav(Task):
    """Each view predicts to which prototypes the other is assigned (Caron et al. 2020, arXiv:2006.09882).

    Assignments are evened out over the batch and, from the share `queue_from` of the steps on, over `queue` images seen before. What waits
    is what the network made of them, not the head, which would have left it behind: the loss then went back to log K (decision 19).
    The head is the published one. Its BatchNorm takes away what all images share; with DINO's head, which has none, SGD ended at log K too.
    """

    queued: Tensor

    def __init__(self, width: int, prototypes: int, queue: int, queue_from: float) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(width, HIDDEN),
            nn.BatchNorm1d(HIDDEN, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(HIDDEN, BOTTLENECK),
        )
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, BOTTLENECK), dim=-1))
        self.queue_from = queue_from
        self.register_buffer("queued", torch.zeros(2, queue, width))
        self.filled = 0

    def forward(self, features: Features, views: Tensor, codes: Tensor, rng: torch.Generator, share: float) -> Tensor:
        images = views.shape[1]
        found = features(views.flatten(0, 1)).view(2, images, -1)
        scores = self._scores(found)
        with torch.no_grad():
            waiting = self.queued[:, : self.filled if share >= self.queue_from else 0]
            among = self._scores(torch.cat([found, waiting], dim=1)) if waiting.shape[1] else scores
            targets = torch.stack([sinkhorn_knopp(view, SWAV_EPSILON)[:images] for view in among])
            self._wait(found)
        return dino_loss(scores, targets, STUDENT_TEMPERATURE, skip_same_view=True) / 2

    def _scores(self, found: Tensor) -> Tensor:
        """[2, n, K], each within [-1, 1], of features [2, n, D]."""
        projected = self.projection(found.flatten(0, 1)).view(*found.shape[:2], -1)
        return F.normalize(projected, dim=-1) @ F.normalize(self.prototypes, dim=-1).T

    def _wait(self, found: Tensor) -> None:
        """The newest come first, the oldest leave."""
        size = self.queued.shape[1]
        self.queued = torch.cat([found.detach(), self.queued], dim=1)[:, :size]
        self.filled = min(size, self.filled + found.shape[1])


def make_task(
    name: TaskName, network: nn.Module, width: int, classes: int, seed: int, prototypes: int = 500, queue: int = 1024
) -> Task:
    """With a head drawn by the seed; `width` of the features, `classes` of the labels. prototypes and queue are those of swav."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if name == "labels":
            return Labels(width, classes)
        if name == "rotation":
            return Rotation(width)
        if name == "dino":
            return Dino(network, width)
        return Swav(width, prototypes, queue, queue_from=0.2)
