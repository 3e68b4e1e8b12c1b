"""Baselines that choose units without a regression: by the size of their weights, or at random.

Shapes: n units.
"""

import hashlib

import numpy as np
from torch import nn

from lodeset.pruning.units.groups import Group, Reader, columns, layer_of
from lodeset.pruning.units.moments import Array, Indices


def magnitude_scores(model: nn.Module, group: Group) -> Array:
    """Score [n] of each unit: L2 norm of the rows that make it (without biases) times L2 norm of the columns that read it.

    The product does not change when a unit's scale is moved between the layers, as each norm by itself would.
    """

    def squares(side: tuple[Reader, ...], axis: int) -> Array:
        total = np.zeros(group.units)
        for one in side:
            weight = columns(layer_of(model, one.name)).double().cpu().numpy()
            total += np.bincount(one.unit_of, (weight**2).sum(axis=axis), minlength=group.units)
        return total

    return np.asarray(np.sqrt(squares(group.makers, 1) * squares(group.readers, 0)))


def random_scores(units: int, name: str, seed: int) -> Array:
    """Score [n] that ranks the units at random; the ranking depends on the seed and the layer's name alone.

    One ranking serves every sparsity, so a smaller random selection is part of a larger one.
    """
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.random.default_rng((seed, stream)).permutation(units).astype(np.float64)


def top(scores: Array, count: int) -> Indices:
    """The `count` highest scores' indices, ascending; of equal scores the lower index stays."""
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[:count]).astype(np.int64)
