"""Iterative magnitude pruning with late rewinding, with or without labels (Caron et al., "Pruning Convolutional Neural
Networks with Self-Supervision", arXiv:2001.03554; rewinding: Frankle et al., arXiv:1903.01611).

Each round trains a network, removes a share of its remaining weights (those of smallest magnitude), resets the others
to their values shortly after the start, and trains again. The optimizer starts anew at every reset.

Shapes: n units of a group.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.at_random import random_scores
from lodeset.pruning.choosing.magnitude import magnitude_scores, top
from lodeset.pruning.learning.examples import Examples
from lodeset.pruning.learning.loop import Recipe, train
from lodeset.pruning.learning.masks import Masks, at_random, by_magnitude, everything, maskable
from lodeset.pruning.learning.tasks import Task
from lodeset.pruning.units.groups import Group, layer_of
from lodeset.pruning.units.moments import Array, Indices
from lodeset.pruning.units.removal import Replacement
from lodeset.training.vit import DinoVisionTransformer

State = dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """Starting point of the rounds: a network and its task after the first steps."""

    network: State
    task: State


def fresh(network: nn.Module, seed: int) -> nn.Module:
    """A network of the same architecture with newly initialized weights.

    Raises:
        LodesetError: it has weights that its layers cannot initialize.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if isinstance(network, DinoVisionTransformer):
            drawn_anew: nn.Module = DinoVisionTransformer(network.config, network.image_size)
            if {n: p.shape for n, p in drawn_anew.named_parameters()} != {
                n: p.shape for n, p in network.named_parameters()
            }:
                raise LodesetError("a transformer that is already pruned cannot be initialized anew: use start: model")
            return drawn_anew
        drawn_anew = copy.deepcopy(network)
        drawn: set[int] = set()
        for module in drawn_anew.modules():
            if callable(draw := getattr(module, "reset_parameters", None)):
                draw()
                drawn |= {id(p) for p in module.parameters(recurse=False)}
    undrawn = [name for name, p in drawn_anew.named_parameters() if id(p) not in drawn]
    if undrawn:
        raise LodesetError(f"{', '.join(undrawn)} belong to no layer that can initialize them: use start: model")
    return drawn_anew


def state_of(module: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def begin(network: nn.Module, task: Task, examples: Examples, recipe: Recipe, rewind: int) -> tuple[Start, float]:
    """Train the dense network in place; return the starting point of later rounds, taken after `rewind` steps, and the
    last loss.

    Raises:
        LodesetError: as `train`.
    """
    masks = everything(network)
    train(network, task, masks, examples, recipe, range(rewind))
    start = Start(state_of(network), state_of(task))
    return start, train(network, task, masks, examples, recipe, range(rewind, recipe.steps))


def again(
    network: nn.Module, task: Task, start: Start, masks: Masks, examples: Examples, recipe: Recipe, rewind: int
) -> float:
    """Reset a network and its task to the start, and train the weights that the masks keep, in place; return the last
    loss.

    Raises:
        LodesetError: as `train`.
    """
    network.load_state_dict(start.network)
    task.load_state_dict(start.task)
    return train(network, task, masks, examples, recipe, range(rewind, recipe.steps))


def next_masks(
    network: nn.Module,
    masks: Masks,
    share: float,
    scope: Literal["global", "layer"],
    groups: Sequence[Group] | None,
) -> Masks:
    """Masks of the next round: keep the share `share` of all weights of a trained network, or of its units if groups
    are given.
    """
    if groups is None:
        return by_magnitude(network, masks, share, scope)
    before = units_kept(masks, groups)
    scores = {group.name: _on_average_one(magnitude_scores(network, group), before[group.name]) for group in groups}
    if scope == "layer":
        kept = {name: top(of_units, max(1, round(len(of_units) * share))) for name, of_units in scores.items()}
    else:
        together = np.concatenate([scores[name][units] for name, units in before.items()])
        bar = np.sort(together)[::-1][max(1, round(sum(map(len, scores.values())) * share)) - 1]
        kept = {
            name: top(scores[name], max(1, int((scores[name][units] >= bar).sum()))) for name, units in before.items()
        }
    return unit_masks(network, groups, kept)


def random_masks(network: nn.Module, masks: Masks, groups: Sequence[Group] | None, seed: int) -> Masks:
    """Random masks with as many weights in every layer, or units in every group, as `masks`."""
    if groups is None:
        return at_random(masks, seed)
    counts = {name: len(units) for name, units in units_kept(masks, groups).items()}
    kept = {group.name: top(random_scores(group.units, group.name, seed), counts[group.name]) for group in groups}
    return unit_masks(network, groups, kept)


def _on_average_one(scores: Array, kept: Indices) -> Array:
    """Scores [n] divided by their mean, comparable between groups; removed units rank below all others."""
    comparable = np.full(len(scores), -1.0)
    comparable[kept] = scores[kept] / max(float(scores[kept].mean()), 1e-30)
    return comparable


def unit_masks(network: nn.Module, groups: Sequence[Group], kept: Mapping[str, Indices]) -> Masks:
    """Masks that drop the rows that make the removed units and the columns that read them."""
    masks = everything(network)
    weights = {id(weight): name for name, weight in maskable(network).items()}
    for group in groups:
        gone = np.setdiff1d(np.arange(group.units), kept[group.name])
        for member, axis in [(maker, 0) for maker in group.makers] + [(reader, 1) for reader in group.readers]:
            layer = layer_of(network, member.name)
            flat = masks[weights[id(layer.weight)]].flatten(1)
            flat.index_fill_(axis, torch.from_numpy(np.flatnonzero(np.isin(member.unit_of, gone))), False)
    return masks


def units_kept(masks: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, Indices]:
    """The units of each group that some layer still reads, ascending."""
    kept = {}
    for group in groups:
        reader = group.readers[0]
        read = masks[f"{reader.name}.weight"].flatten(1).any(dim=0).numpy()
        kept[group.name] = np.unique(reader.unit_of[read]).astype(np.int64)
    return kept


def without_units(groups: Sequence[Group], masks: Mapping[str, Tensor]) -> dict[str, Replacement]:
    """The replacements with which `removal.apply` shrinks a network that is masked by units."""
    return {name: Replacement(units, {}) for name, units in units_kept(masks, groups).items()}
