"""Every combination of choosing units and rewriting weights at one sparsity.

The penalty's strength decides how many units the entropic method keeps in a group. The other criteria then keep exactly
as many units in that group, so that only the choice of units and of weights differs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.criteria import Candidates, criterion_of, refits
from lodeset.pruning.choosing.entropic import Layer, Rewritten, Solution, path
from lodeset.pruning.choosing.magnitude import top
from lodeset.pruning.choosing.refit import refit
from lodeset.pruning.config import PruneJob
from lodeset.pruning.units.groups import Group, columns, layer_of
from lodeset.pruning.units.moments import Array, Gram, Indices
from lodeset.pruning.units.removal import Replacement, Weights, masked


@dataclass(frozen=True)
class Variant:
    """The plan of one pruned model: the replacement of every group, and how well it reconstructs the dense layers."""

    method: str
    layers: dict[str, Replacement]  # by group
    # By layer that reads units: mean square error on the calibration positions over the dense output's variance. For
    # models solved in turn, the error of the sum that the output is added to, in the output's scale.
    unexplained: dict[str, float]
    converged: bool  # whether every group's solve settled within max_iterations


def layers_of(group: Group, grams: Mapping[str, Gram]) -> list[Layer]:
    """The layers that read a group, with their moments.

    Raises:
        LodesetError: the moments are of another model or cannot be used.
    """
    layers = []
    for reader in group.readers:
        gram = grams.get(reader.name)
        seen = 0 if gram is None else len(gram.sum_x)
        if gram is None or seen != len(reader.unit_of):
            raise LodesetError(
                f"{reader.name}: the moments cover {seen} inputs and the layer takes {len(reader.unit_of)}: "
                "measure them again on this checkpoint"
            )
        layers.append(Layer(reader.name, gram.moments(reader.name), reader.unit_of))
    return layers


Solutions = dict[str, dict[float, Solution]]  # by group and eps_w
Paths = dict[str, dict[float, Array]]  # w [n] by group and strength


def solved_at_once(
    groups: Sequence[Group], grams: Mapping[str, Gram], job: PruneJob
) -> tuple[Solutions, Paths, dict[str, str]]:
    """Solve every group by itself over the whole sweep; also return w along the path, and why groups cannot be
    solved.
    """
    solved: Solutions = {}
    paths: Paths = {}
    refused: dict[str, str] = {}
    for group in groups:
        followed: dict[float, Array] = {}
        try:
            solved[group.name] = path(layers_of(group, grams), group.units, job, followed)
        except LodesetError as error:
            refused[group.name] = str(error)
        else:
            paths[group.name] = followed
    return solved, paths, refused


def _unexplained(layers: Sequence[Layer], new: Replacement) -> dict[str, float]:
    of = new.readers
    return {layer.name: layer.moments.unexplained(of[layer.name].weight, of[layer.name].bias) for layer in layers}


def variant(
    model: nn.Module,
    groups: Sequence[Group],
    grams: Mapping[str, Gram],
    job: PruneJob,
    method: str,
    chosen: Mapping[str, Solution],
) -> Variant:
    """Compute one variant; the result does not depend on the worker or the order. `chosen`: each group's solution at
    its strength.

    Raises:
        LodesetError: the moments are of another model or cannot be used.
    """
    replacements: dict[str, Replacement] = {}
    lost: dict[str, float] = {}
    for group in groups:
        layers = layers_of(group, grams)
        new = _replacement(model, group, layers, job, chosen[group.name], method)
        replacements[group.name] = new
        lost |= _unexplained(layers, new)
    return Variant(method, replacements, lost, all(chosen[group.name].converged for group in groups))


def lost_alone(
    model: nn.Module,
    group: Group,
    grams: Mapping[str, Gram],
    job: PruneJob,
    solved: Mapping[float, Solution],
    change: Callable[[nn.Module], float],
) -> dict[float, float]:
    """The value of `change` for the model with only this group pruned and refitted, by strength."""
    layers = layers_of(group, grams)
    lost = {}
    for eps, solution in solved.items():
        new = _replacement(model, group, layers, job, solution, "entropic+refit")
        lost[eps] = change(masked(model, {group.name: new})) if len(new.keep) < group.units else 0.0
    return lost


def units_kept(group: Group, support: int, round_to: int) -> int:
    """Number of units to keep when `support` units have weight: rounded up to a multiple, except for attention
    heads.
    """
    multiple = 1 if group.heads is not None else round_to
    return min(group.units, -(-support // multiple) * multiple)


def units_of(
    model: nn.Module, group: Group, layers: Sequence[Layer], job: PruneJob, solution: Solution, method: str
) -> Indices:
    """The units [k] of a group that a method keeps, ascending: as many as the solution keeps."""
    count = units_kept(group, len(solution.support), job.round_to)
    units = Candidates(model=model, group=group, layers=layers, solution=solution, seed=job.seed)
    return top(criterion_of(method).of(units), count)


def rewritten(model: nn.Module, layer: Layer, keep: Indices, solved: Rewritten | None, method: str) -> Weights:
    """The new weights of a layer that can only read the units `keep`; `solved` is the solution of the penalized
    problem.
    """
    kept = np.isin(layer.unit_of, keep)
    if refits(method):
        return Weights(*refit(layer.moments, np.flatnonzero(kept)))
    if criterion_of(method).has_weights:
        assert solved is not None
        return Weights(solved.q, solved.bias)
    module = layer_of(model, layer.name)
    weight = columns(module).double().cpu().numpy() * kept
    bias = np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().cpu().numpy()
    return Weights(weight, bias)


def _replacement(
    model: nn.Module, group: Group, layers: Sequence[Layer], job: PruneJob, solution: Solution, method: str
) -> Replacement:
    keep = units_of(model, group, layers, job, solution, method)
    pairs = zip(layers, solution.layers, strict=True)
    return Replacement(keep, {layer.name: rewritten(model, layer, keep, solved, method) for layer, solved in pairs})
