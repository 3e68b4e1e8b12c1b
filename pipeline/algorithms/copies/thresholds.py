"""Choose similarity thresholds for an embedder from its similarities of copies and of different images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_SCORE = 0.0  # minimum log-odds of an edge


@dataclass(frozen=True)
class Thresholds:
    """Cosines. `reference` is never above `pool`: against a reference set, a miss costs more than a lost image."""

    pool: float
    reference: float


def candidates(copies: NDArray[np.float32]) -> Thresholds:
    """For pairs that are verified afterwards: low enough that 9 of 10 generated copies (19 of 20 for references)
    pass.
    """
    pool, reference = np.quantile(copies, [0.10, 0.05])
    return Thresholds(round(float(pool), 3), round(float(reference), 3))


def unverified(strangers: NDArray[np.float32]) -> Thresholds:
    """For pairs that nothing else checks: above the nearest different image of 99.5 % of images (97 % for references).

    `strangers` are each image's most similar ones in the whole pool that are not copies of it according to its
    thumbnail. Random pairs would set the threshold far too low, because each of N images meets N - 1 others.
    """
    pool, reference = np.quantile(strangers, [0.995, 0.97])
    return Thresholds(round(float(pool), 3), round(float(reference), 3))
