"""Refit layers that read prunable units in the order of the forward pass, each on its actual input behind the pruned
layers.

A group's units are chosen at the first layer that reads them. Layers that read the same units later, behind other
pruned layers, are refitted in turns of their own, and so are the readers of groups that stay whole. In the finished
model each of these layers is then the best fit for its actual input; a layer that is called more than once is fitted on
its earlier input. Methods without a refit only choose units in turn: the weights of `entropic` are those of its own
problem, and the others keep the dense model's weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.criteria import refits
from lodeset.pruning.choosing.entropic import Layer, Solution, path
from lodeset.pruning.choosing.variants import Solutions, Variant, layers_of, rewritten, units_of
from lodeset.pruning.config import PruneJob
from lodeset.pruning.units.activations import Behind
from lodeset.pruning.units.groups import Group
from lodeset.pruning.units.moments import Gram
from lodeset.pruning.units.removal import Replacement, Weights, masked

# Measures moments of some layers (last argument) of the order in a partially pruned model.
Measure = Callable[[nn.Module, Sequence[str], Sequence[str]], Mapping[str, Behind]]
# Solves a group from the inputs of its readers and the outputs of the dense model; None leaves the group whole.
Solve = Callable[[Group, Mapping[str, Gram]], Solution | None]


def solved_in_turn(
    model: nn.Module, groups: Sequence[Group], order: Sequence[str], measure: Measure, job: PruneJob, eps_w: float
) -> tuple[Solutions, dict[str, str]]:
    """Solve every group at one strength behind the pruned and refitted groups before it; also return why groups cannot
    be solved.

    order: the layers that read the groups, in the order of the forward pass. Units are chosen by the dense layers'
    outputs.
    """
    solved: Solutions = {}
    refused: dict[str, str] = {}
    at = job.model_copy(update={"sweep": (eps_w,)})

    def solve(group: Group, grams: Mapping[str, Gram]) -> Solution:
        solved[group.name] = path(layers_of(group, grams), group.units, at)
        return solved[group.name][eps_w]

    _turns(model, groups, order, measure, job, "entropic+refit", solve, refused)
    return {name: by_eps for name, by_eps in solved.items() if name not in refused}, refused


def variant_in_turn(
    model: nn.Module,
    groups: Sequence[Group],
    order: Sequence[str],
    measure: Measure,
    job: PruneJob,
    method: str,
    chosen: Mapping[str, Solution],
) -> Variant:
    """Like `variants.variant`, but each layer is measured behind the layers that this method has already pruned.

    Groups that are not `chosen` stay whole.

    Raises:
        LodesetError: the moments cannot be used.
    """
    selected = [group for group in groups if refits(method) or group.name in chosen]  # the others would not change
    done, lost = _turns(model, selected, order, measure, job, method, lambda group, _: chosen.get(group.name), None)
    return Variant(method, done, lost, all(solution.converged for solution in chosen.values()))


def _turns(
    model: nn.Module,
    groups: Sequence[Group],
    order: Sequence[str],
    measure: Measure,
    job: PruneJob,
    method: str,
    solve: Solve,
    refused: dict[str, str] | None,
) -> tuple[dict[str, Replacement], dict[str, float]]:
    """The replacement of every group, and the loss of each layer in its turn.

    The loss is the mean square error over the variance of the dense output. It is measured on the sum that the layer's
    output is added to, in the output's scale (divided by LayerScale's gains), or on the output itself. If `refused` is
    given, it receives the reasons why groups cannot be pruned.

    Raises:
        LodesetError: a group cannot be pruned, and `refused` is None.
    """
    group_of = {reader.name: group for group in groups for reader in group.readers}
    solutions: dict[str, Solution | None] = {}
    done: dict[str, Replacement] = {}
    lost: dict[str, float] = {}

    def turn(name: str, group: Group) -> None:
        readers = [reader.name for reader in group.readers]
        first = group.name not in solutions
        behind = measure(masked(model, done), order, readers if first else [name])
        if first:  # choose units for all layers that read them
            grams = {layer: behind_layer.dense for layer, behind_layer in behind.items()}
            solution = solutions[group.name] = solve(group, grams)
            keep = np.arange(group.units)
            if solution is not None:
                keep = units_of(model, group, layers_of(group, grams), job, solution, method)
            done[group.name] = Replacement(keep, {})
        solution, keep = solutions[group.name], done[group.name].keep
        number = readers.index(name)
        alone = replace(group, readers=(group.readers[number],))
        dense, needed = (layers_of(alone, {name: gram})[0] for gram in (behind[name].dense, behind[name].needed))
        new = rewritten(model, needed, keep, None if solution is None else solution.layers[number], method)
        done[group.name] = Replacement(keep, {**done[group.name].readers, name: new})
        lost[name] = _share_lost(new, dense, needed)

    for name in (layer for layer in order if layer in group_of):
        group = group_of[name]
        if refused is not None and group.name in refused:
            continue
        try:
            turn(name, group)
        except LodesetError as error:
            if refused is None:
                raise
            refused[group.name] = str(error)
            done.pop(group.name, None)
    return done, lost


def _share_lost(new: Weights, dense: Layer, needed: Layer) -> float:
    wrong = needed.moments.unexplained(new.weight, new.bias) * needed.moments.var_y.sum()
    return float(wrong / dense.moments.var_y.sum())
