"""Small networks that weigh the measures of a pair. They ship with the package; P pairs, F measures."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scorer:
    """E networks with two hidden layers of H units; the last column of each matrix is the bias."""

    mean: Floats  # [F]
    deviation: Floats  # [F]
    hidden: Floats  # [E, H, F + 1]
    deeper: Floats  # [E, H, H + 1]
    output: Floats  # [E, 1, H + 1]

    def score(self, features: Floats) -> Floats:
        """Log-odds [P] that pairs with these features [P, F] are copies: the mean over the networks."""
        if len(features) == 1:  # a product of a single row is rounded differently from that of several rows
            return self.score(np.repeat(features, 2, axis=0))[:1]
        scaled = torch.from_numpy(((features - self.mean) / self.deviation).clip(-4, 4).astype(np.float32))
        total = torch.zeros(len(features))
        for hidden, deeper, output in zip(self.hidden, self.deeper, self.output, strict=True):
            units = functional.silu(_layer(scaled, hidden))
            total += _layer(functional.silu(_layer(units, deeper)), output)[:, 0]
        return np.asarray((total / len(self.hidden)).numpy())


def _layer(inputs: torch.Tensor, weights: Floats) -> torch.Tensor:
    matrix = torch.from_numpy(weights)
    return inputs @ matrix[:, :-1].T + matrix[:, -1]


def scorer_of(arrays: Mapping[str, NDArray[np.float32]]) -> Scorer:
    """A scorer from the arrays of a file."""
    return Scorer(**{field.name: arrays[field.name] for field in fields(Scorer)})


@functools.lru_cache(maxsize=4)
def arrays_of(path: Path) -> dict[str, Floats]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
