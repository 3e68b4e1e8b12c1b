"""Similarity thresholds that fit an embedder, from how similar it finds copies and strangers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Thresholds:
    """Cosines. `reference` is never above `pool`: against a reference set, a miss costs more than a lost image."""

    pool: float
    reference: float


def candidates(copies: NDArray[np.float32]) -> Thresholds:
    """For pairs that are verified afterwards: low enough that 9 of 10 generated copies (19 of 20 for references) pass."""
    pool, reference = np.quantile(copies, [0.10, 0.05])
    return Thresholds(round(float(pool), 3), round(float(reference), 3))


def unverified(strangers: NDArray[np.float32]) -> Thresholds:
    """For pairs that nothing else checks: above the nearest stranger of 99.5 % of images (97 % for references).

    Strangers are each image's most similar one in the whole pool that is no copy of it by its thumbnail. Random pairs
    would set it far too low: among N images every one meets N - 1 others.
    """
    pool, reference = np.quantile(strangers, [0.995, 0.97])
    return Thresholds(round(float(pool), 3), round(float(reference), 3))
