"""The criteria that choose units, and the methods made of them.

A plan reads the names here, so this module loads no torch; the file of a criterion is imported when its scores are
first needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lodeset.pipeline.references import resolved

if TYPE_CHECKING:
    from torch import nn

    from lodeset.pruning.choosing.entropic import Layer, Solution
    from lodeset.pruning.units.groups import Group
    from lodeset.pruning.units.moments import Array

REFIT = "+refit"  # suffix of a method whose layers are refitted on the kept units


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The units of one group, as a criterion sees them.

    Attributes:
        model: the dense model. group: who makes and who reads the units. layers: the layers that read them, with the
        moments of their inputs and outputs on the calibration images. solution: what the entropic method found for the
        group at this strength. It also decides how many units are kept. seed: the job's.
    """

    model: nn.Module
    group: Group
    layers: Sequence[Layer]
    solution: Solution
    seed: int


class Scores(Protocol):
    def __call__(self, units: Candidates) -> Array:
        """A score for each unit; those with the highest scores are kept."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A way of choosing units; it enters the names of methods, reports and charts.

    Attributes:
        name: a word in lower case.
        scores: where its `Scores` are, as "package.module:function".
        has_weights: without refit the layers take the weights of the solution, instead of keeping the dense model's.
    """

    name: str
    scores: str
    has_weights: bool = False

    def of(self, units: Candidates) -> Array:
        scores: Scores = resolved(self.scores)
        return scores(units)


CRITERIA = (
    Criterion(name="entropic", scores="lodeset.pruning.choosing.entropic:scores", has_weights=True),
    Criterion(name="magnitude", scores="lodeset.pruning.choosing.magnitude:scores"),
    Criterion(name="random", scores="lodeset.pruning.choosing.at_random:scores"),
)

# A method is a criterion, optionally followed by least squares on the units that it keeps.
METHODS = tuple(criterion.name + ending for criterion in CRITERIA for ending in ("", REFIT))
REFITTED = tuple(criterion.name + REFIT for criterion in CRITERIA)


def refits(method: str) -> bool:
    return method.endswith(REFIT)


def criterion_of(method: str) -> Criterion:
    """The criterion of one of `METHODS`."""
    name = method.removesuffix(REFIT)
    return next(criterion for criterion in CRITERIA if criterion.name == name)
