"""The baseline that chooses units by the size of their weights. Shapes: n units."""

import numpy as np
from torch import nn

from lodeset.pruning.choosing.criteria import Candidates
from lodeset.pruning.units.groups import Group, Reader, columns, layer_of
from lodeset.pruning.units.moments import Array, Indices


def scores(units: Candidates) -> Array:
    return magnitude_scores(units.model, units.group)


def magnitude_scores(model: nn.Module, group: Group) -> Array:
    """Score [n] of each unit: L2 norm of the rows that make it (without biases) times L2 norm of the columns that read
    it.

    The product does not change when a unit's scale is moved between layers; each norm alone would change.
    """

    def squares(side: tuple[Reader, ...], axis: int) -> Array:
        total = np.zeros(group.units)
        for member in side:
            weight = columns(layer_of(model, member.name)).double().cpu().numpy()
            total += np.bincount(member.unit_of, (weight**2).sum(axis=axis), minlength=group.units)
        return total

    return np.asarray(np.sqrt(squares(group.makers, 1) * squares(group.readers, 0)))


def top(scores: Array, count: int) -> Indices:
    """Ascending indices of the `count` highest scores; ties go to the lower index."""
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[:count]).astype(np.int64)
