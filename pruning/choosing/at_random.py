"""The baseline that any choice of units must beat: random scores. Shapes: n units."""

import hashlib

import numpy as np

from lodeset.pruning.choosing.criteria import Candidates
from lodeset.pruning.units.moments import Array


def scores(units: Candidates) -> Array:
    return random_scores(units.group.units, units.group.name, units.seed)


def random_scores(units: int, name: str, seed: int) -> Array:
    """Score [n] that ranks the units at random; the ranking depends only on the seed and the layer's name.

    The same ranking serves every sparsity, so a smaller random selection is a subset of a larger one.
    """
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.random.default_rng((seed, stream)).permutation(units).astype(np.float64)
