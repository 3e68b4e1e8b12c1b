"""The tasks that a network is trained on during the search for masks: predict labels or rotations, or recognize two
views of the same image. A task is a loss with the head that it needs.

Features are the first output of a network, flattened. Every task uses both views of an image; tasks that look at a
single view use them as two examples.

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
Features = Callable[[Tensor], Tensor]  # normalized pixels [B, 3, S, S] -> [B, D]

# Sizes of the heads of dino and swav: small, like the networks for which many rounds of training are practical.
HIDDEN, BOTTLENECK = 256, 64
STUDENT_TEMPERATURE = 0.1
DINO_TEMPERATURE, DINO_PROTOTYPES, DINO_MOMENTUM = 0.04, 512, 0.99
SWAV_EPSILON = 0.05


def features_of(network: Callable[[Tensor], Any], pixels: Tensor) -> Tensor:
    """Features [B, D] of normalized pixels [B, 3, S, S]."""
    return outputs_of(network(pixels))[0].flatten(1)


class Task(nn.Module):
    """A loss of a network's features of images, with its head."""

    def forward(self, features: Features, views: Tensor, codes: Tensor, rng: torch.Generator, share: float) -> Tensor:
        """Return a scalar. views: normalized [2, b, 3, S, S]; codes: classes [b] (-1: none); share: share of the steps
        that are done.
        """
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
    """Predict the number of quarter turns of an image (Gidaris et al. 2018, arXiv:1803.07728); one draw per view, where
    the paper uses all four.
    """

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
    """Self-distillation of two global views (Caron et al. 2021, arXiv:2104.14294); Sinkhorn-Knopp centers the teacher's
    scores.

    Local views are not used: a network of any kind may accept only one image size.
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
    """Match the features of another, frozen network: the mean square difference over their variance in the batch."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(teacher).requires_grad_(False).eval()

    def forward(self, features: Features, views: Tensor, codes: Tensor, rng: torch.Generator, share: float) -> Tensor:
        pixels = views.flatten(0, 1)
        with torch.no_grad():
            expected = features_of(self.teacher, pixels)
        return (features(pixels) - expected).square().mean() / expected.var(dim=0, correction=0).mean()


class Swav(Task):
    """Each view predicts the prototype assignment of the other (Caron et al. 2020, arXiv:2006.09882).

    Assignments are balanced over the batch and, after the share `queue_from` of the steps, over `queue` earlier images.
    The queue holds the network's features rather than the head's outputs: the head changes too fast, and with its
    outputs the loss went back to log K (decision 19). The head is the published one. Its BatchNorm removes what all
    images share; with DINO's head, which has none, SGD ended at log K as well.
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
        features_of_views = features(views.flatten(0, 1)).view(2, images, -1)
        scores = self._scores(features_of_views)
        with torch.no_grad():
            waiting = self.queued[:, : self.filled if share >= self.queue_from else 0]
            among = self._scores(torch.cat([features_of_views, waiting], dim=1)) if waiting.shape[1] else scores
            targets = torch.stack([sinkhorn_knopp(view, SWAV_EPSILON)[:images] for view in among])
            self._wait(features_of_views)
        return dino_loss(scores, targets, STUDENT_TEMPERATURE, skip_same_view=True) / 2

    def _scores(self, features_of_views: Tensor) -> Tensor:
        """Scores [2, n, K], each within [-1, 1], of features [2, n, D]."""
        projected = self.projection(features_of_views.flatten(0, 1)).view(*features_of_views.shape[:2], -1)
        return F.normalize(projected, dim=-1) @ F.normalize(self.prototypes, dim=-1).T

    def _wait(self, features_of_views: Tensor) -> None:
        """Queue features: the newest come first, the oldest leave."""
        size = self.queued.shape[1]
        self.queued = torch.cat([features_of_views.detach(), self.queued], dim=1)[:, :size]
        self.filled = min(size, self.filled + features_of_views.shape[1])


def make_task(
    name: TaskName, network: nn.Module, width: int, classes: int, seed: int, prototypes: int = 500, queue: int = 1024
) -> Task:
    """A task with a head initialized by the seed; `width` of the features, `classes` of the labels. prototypes and
    queue are for swav.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if name == "labels":
            return Labels(width, classes)
        if name == "rotation":
            return Rotation(width)
        if name == "dino":
            return Dino(network, width)
        return Swav(width, prototypes, queue, queue_from=0.2)
