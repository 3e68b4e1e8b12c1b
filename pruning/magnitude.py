"""Baselines that choose units without a regression: by the size of their weights, or at random.

Shapes: n hidden units, m outputs, k units kept.
"""

import hashlib

import numpy as np
import torch

from pruning.entropic import Array, Indices


def magnitude_scores(fc1: torch.nn.Linear, fc2: torch.nn.Linear) -> Array:
    """Score [n] of each hidden unit: L2 norm of its row of fc1 (without the bias) times L2 norm of its column of fc2.

    The product does not change when a unit's scale is moved between the two layers, as each norm by itself would.
    """
    into = torch.linalg.vector_norm(fc1.weight.detach().double(), dim=1)
    out_of = torch.linalg.vector_norm(fc2.weight.detach().double(), dim=0)
    return np.asarray((into * out_of).cpu().numpy(), dtype=np.float64)


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
