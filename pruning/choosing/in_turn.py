"""Layers that read prunable units, refitted in the order of the forward pass, each for what it takes when all before it are what they stay.

A group's units are chosen when the first layer that reads them has its turn; layers that read them later, behind other pruned layers, are
refitted in a turn of their own, and so are those of groups that stay whole. In the finished model each of them is then the best one for
what it really takes; where it is called more than once, for what it took before. Methods without refit only choose units in turn:
entropic's own weights are those of the problem that was solved, the others the dense model's.
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

# Moments of some layers (last) of the order, in a model that is pruned in part.
Measure = Callable[[nn.Module, Sequence[str], Sequence[str]], Mapping[str, Behind]]
# Of a group whose turn comes, by what its readers take and the dense model gives; none: it stays whole.
Solve = Callable[[Group, Mapping[str, Gram]], Solution | None]


def solved_in_turn(
    model: nn.Module, groups: Sequence[Group], order: Sequence[str], measure: Measure, job: PruneJob, eps_w: float
) -> tuple[Solutions, dict[str, str]]:
    """Every group at one strength, behind those before it, pruned and refitted; and why groups cannot be solved.

    order: the layers that read the groups, as a forward pass calls them. Units are chosen by what the dense layers give.
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
    """As `variants.variant`, each layer measured behind those before it, as this method prunes them; groups that are not `chosen` stay whole.

    Raises:
        LodesetError: the moments cannot be used.
    """
    of = [group for group in groups if refits(method) or group.name in chosen]  # others would not change
    done, lost = _turns(model, of, order, measure, job, method, lambda group, _: chosen.get(group.name), None)
    return Variant(method, done, lost, all(one.converged for one in chosen.values()))


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
    """What becomes of every group, and what each layer loses in its turn: the mean square error of the sum that its output goes into, in
    the output's scale (over LayerScale's gains), or of the output, over the variance of the dense output. `refused` takes why groups
    cannot be pruned.

    Raises:
        LodesetError: a group cannot be, and there is no `refused`.
    """
    group_of = {reader.name: group for group in groups for reader in group.readers}
    solutions: dict[str, Solution | None] = {}
    done: dict[str, Replacement] = {}
    lost: dict[str, float] = {}

    def turn(name: str, group: Group) -> None:
        readers = [one.name for one in group.readers]
        first = group.name not in solutions
        behind = measure(masked(model, done), order, readers if first else [name])
        if first:  # units are chosen for all that read them
            grams = {one: of.dense for one, of in behind.items()}
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

    for name in (one for one in order if one in group_of):
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
