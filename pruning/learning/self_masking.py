"""Self-masking networks (Warmerdam, Caron & Asano, arXiv:2409.07577): a frozen network learns which of its weights to
use.

    theta <- theta * M / sqrt(mean(M)),   M = 1[S > 0],   S = 1 at the start

Scores S are trained by SGD with momentum and without weight decay. The gradient of M is passed to S unchanged (straight
through), and the scale 1 / sqrt(mean(M)) of each weight is not differentiated. Weights of convolutions and linear
layers are masked; norms, biases and positions never are, and BatchNorms stay in evaluation mode, so a network and its
masks are all that has to be stored.
"""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.learning.examples import Examples
from lodeset.pruning.learning.loop import NotLearnedError, Recipe, descend
from lodeset.pruning.learning.masks import Masks, digest_of, load_masks, maskable
from lodeset.pruning.learning.tasks import Task, features_of

MOMENTUM = 0.9


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return (scores > 0).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def scaled(weight: Tensor, mask: Tensor) -> Tensor:
    """weight * M / sqrt(mean(M)): keeps the mean magnitude if removed and kept weights are alike."""
    return weight * mask / mask.mean().clamp(min=1 / mask.numel()).sqrt().detach()


def learn_masks(
    network: nn.Module, task: Task, examples: Examples, recipe: Recipe, head_lr: float
) -> tuple[Masks, float]:
    """Learn masks of a network, which itself is unchanged; return them and the mean loss of the last steps. `recipe.lr`
    is the scores' rate.

    Raises:
        NotLearnedError: as `descend`; or a layer lost all of its weights.
        LodesetError: as `descend`.
    """
    frozen = copy.deepcopy(network).requires_grad_(False).eval()
    weights = {name: weight.detach() for name, weight in maskable(frozen).items()}
    scores = {name: torch.ones_like(weight, requires_grad=True) for name, weight in weights.items()}
    optimiser = torch.optim.SGD(
        [
            {"params": list(scores.values()), "lr": recipe.lr},
            {"params": [p for p in task.parameters() if p.requires_grad], "lr": head_lr},
        ],
        momentum=MOMENTUM,
    )

    def features(pixels: Tensor) -> Tensor:
        swapped = {name: scaled(weight, _StraightThrough.apply(scores[name])) for name, weight in weights.items()}  # type: ignore[no-untyped-call]
        return features_of(functools.partial(functional_call, frozen, swapped), pixels)

    loss = descend(task, features, examples, optimiser, recipe, range(recipe.steps), lambda _: None)
    masks = {name: score.detach() > 0 for name, score in scores.items()}
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        raise NotLearnedError(f"masking removed all weights of {', '.join(empty)}: lower lr ({recipe.lr:g})")
    return masks, loss


def masked_network(network: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network with the weights theta * M / sqrt(mean(M)).

    Raises:
        LodesetError: the masks are for another architecture.
    """
    masked = copy.deepcopy(network)
    weights = maskable(masked)
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            actual = tuple(weights[name].shape) if name in weights else "nothing"
            raise LodesetError(
                f"masks are for {tuple(mask.shape)} weights in {name}, and the network has {actual} there"
            )
        with torch.no_grad():
            weights[name].copy_(scaled(weights[name], mask.to(weights[name].dtype)))
    return masked


def load_masked(network: nn.Module, path: Path) -> nn.Module:
    """A copy of the network with the masks from a file.

    Raises:
        LodesetError: the file contains no masks, or masks for other weights.
    """
    masks, of = load_masks(path)
    actual = digest_of(network.state_dict())
    if actual != of:
        raise LodesetError(f"{path} holds masks for the weights {of[:12]}, and the network's are {actual[:12]}")
    return masked_network(network, masks)
