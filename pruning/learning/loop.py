"""The training loop of a task on a network, whether its masked weights are trained or the scores that make a mask."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.learning.examples import Batches
from lodeset.pruning.learning.masks import Masks, cut, maskable
from lodeset.pruning.learning.tasks import Features, Task, features_of
from lodeset.training.order import generator
from lodeset.training.schedules import cosine, linear


class NotLearnedError(LodesetError):
    """A training diverged; another learning rate may work."""


@dataclass(frozen=True)
class Recipe:
    """Length and learning rate: linear warm-up for the share `warmup` of the steps, then half a cosine to 0."""

    steps: int
    lr: float
    weight_decay: float
    warmup: float
    seed: int

    def factor(self, step: int) -> float:
        """Factor of the learning rate at a step."""
        warm = round(self.warmup * self.steps)
        return linear(step + 1, warm, 0.0, 1.0) if step < warm else cosine(step - warm, self.steps - warm, 1.0, 0.0)


def descend(
    task: Task,
    features: Features,
    examples: Batches,
    optimiser: torch.optim.Optimizer,
    recipe: Recipe,
    steps: range,
    after: Callable[[float], None],
) -> float:
    """Run these steps of the recipe, call `after` with the share done after each one, and return the mean loss of the
    last tenth.

    Raises:
        NotLearnedError: the loss is not finite.
        LodesetError: too few images can be read.
    """
    peaks = [group["lr"] for group in optimiser.param_groups]
    last = steps.stop - max(1, len(steps) // 10)
    losses = []
    for step in steps:
        views, codes = examples.at(step)
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * recipe.factor(step)
        drawn = generator(recipe.seed, "steps", step).integers(2**63, size=2).tolist()
        rng = torch.Generator().manual_seed(drawn[0])
        with torch.random.fork_rng(devices=()):  # dropout draws from torch's own generator
            torch.manual_seed(drawn[1])
            loss = task(features, views, codes, rng, step / recipe.steps)
        if not math.isfinite(value := float(loss.detach())):
            raise NotLearnedError(
                f"{type(task).__name__.lower()}: the loss is {value} at step {step} of {recipe.steps}: lower lr "
                f"({peaks[0]:g})"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        after((step + 1) / recipe.steps)
        if step >= last:
            losses.append(value)
    return sum(losses) / max(1, len(losses))


def train(network: nn.Module, task: Task, masks: Masks, examples: Batches, recipe: Recipe, steps: range) -> float:
    """Train the weights that the masks keep, and everything that is never masked, with AdamW; masked weights are 0 from
    the start.

    Raises:
        LodesetError: as `descend`.
    """
    cut(network, masks)
    task.begin(network)
    network.train()
    trained = [p for p in (*network.parameters(), *task.parameters()) if p.requires_grad]
    weights = {id(weight) for weight in maskable(network).values()}
    decayed = [p for p in trained if id(p) in weights]
    others = [p for p in trained if id(p) not in weights]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.lr,
    )

    def after(share: float) -> None:
        cut(network, masks)
        task.follow(network, share)

    try:
        return descend(task, functools.partial(features_of, network), examples, optimiser, recipe, steps, after)
    finally:
        network.eval()
