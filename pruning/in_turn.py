"""Layers rewritten in the order of the forward pass, each for what it takes when all before it are what they stay.

A group's units are chosen when the first layer that reads them has its turn; layers that read them later, behind other pruned
layers, are rewritten in a turn of their own. In the finished model each layer is then the best one for what it really takes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from pipeline.errors import LodesetError
from pruning.config import PruneJob
from pruning.entropic import Solution, path
from pruning.groups import Group
from pruning.moments import Gram
from pruning.removal import Replacement, masked
from pruning.variants import Method, Solutions, Variant, layers_of, rewritten, unexplained, units_of

Measure = Callable[
    [nn.Module, Sequence[str]], Mapping[str, Gram]
]  # moments of layers, in a model that is pruned in part
# Of a group whose turn comes, by the moments of all that read it; none where it cannot be solved.
Solve = Callable[[Group, Mapping[str, Gram]], Solution | None]


def solved_in_turn(
    model: nn.Module, groups: Sequence[Group], order: Sequence[str], measure: Measure, job: PruneJob, eps_w: float
) -> tuple[Solutions, dict[str, str]]:
    """Every group at one strength, behind those before it, pruned and refitted; and why groups cannot be solved.

    order: names of layers, as a forward pass calls them.
    """
    solved: Solutions = {}
    refused: dict[str, str] = {}
    at = job.model_copy(update={"sweep": (eps_w,)})

    def solve(group: Group, grams: Mapping[str, Gram]) -> Solution | None:
        try:
            solved[group.name] = path(layers_of(group, grams), group.units, at)
        except LodesetError as error:
            refused[group.name] = str(error)
            return None
        return solved[group.name][eps_w]

    _turns(model, groups, order, measure, job, "entropic+refit", solve)
    return solved, refused


def variant_in_turn(
    model: nn.Module,
    groups: Sequence[Group],
    order: Sequence[str],
    measure: Measure,
    job: PruneJob,
    method: Method,
    chosen: Mapping[str, Solution],
) -> Variant:
    """As `variants.variant`, each layer measured behind those before it, as this method prunes them.

    Raises:
        LodesetError: the moments cannot be used.
    """
    done, lost = _turns(model, groups, order, measure, job, method, lambda group, _: chosen[group.name])
    return Variant(method, done, lost, all(chosen[group.name].converged for group in groups))


def _turns(
    model: nn.Module,
    groups: Sequence[Group],
    order: Sequence[str],
    measure: Measure,
    job: PruneJob,
    method: Method,
    solve: Solve,
) -> tuple[dict[str, Replacement], dict[str, float]]:
    """What becomes of every group that `solve` solves, and the share of the variance that each layer loses in its turn."""
    group_of = {reader.name: group for group in groups for reader in group.readers}
    solutions: dict[str, Solution | None] = {}
    done: dict[str, Replacement] = {}
    lost: dict[str, float] = {}
    for name in (one for one in order if one in group_of):
        group = group_of[name]
        readers = [one.name for one in group.readers]
        first = group.name not in solutions
        if not first and solutions[group.name] is None:
            continue
        grams = measure(masked(model, done), readers if first else [name])
        if first:  # units are chosen for all that read them
            solutions[group.name] = solve(group, grams)
        solution = solutions[group.name]
        if solution is None:
            continue
        if first:
            keep = units_of(model, group, layers_of(group, grams), job, solution, method)
            done[group.name] = Replacement(keep, {})
        before, number = done[group.name], readers.index(name)
        layer = layers_of(replace(group, readers=(group.readers[number],)), grams)[0]
        new = rewritten(model, layer, before.keep, solution.layers[number], method)
        done[group.name] = Replacement(before.keep, {**before.readers, name: new})
        lost |= unexplained([layer], done[group.name])
    return done, lost
