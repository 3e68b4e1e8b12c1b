"""Which images of each group of copies are kept, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.by_hand import BY_HAND

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcomes:
    """Of N images: whether each is kept, the reason (`unique`, `near`, `reference`, `included`, `by_hand`), and the image that decided: itself
    where it is kept, and where a reference set holds the same bytes. What is in no pool and in no included set has the reason "".
    """

    kept: Bools
    reason: NDArray[np.object_]
    match: Ints


def outcomes(
    pool: Bools, reference: Bools, included: Bools, component: Ints, keeper: Ints, by_hand: Bools | None = None
) -> Outcomes:
    """A component with a reference image is dropped whole, one with included images keeps these, any other its `keeper` [N].

    Pool images that are to be kept `by_hand` [N] are kept besides, unless their component has a reference image.
    """
    spared = np.zeros(len(component), bool) if by_hand is None else by_hand & pool & ~included
    nodes = np.arange(len(component))
    leader, met = _first(component, reference)[component], _first(component, included)[component]
    by_reference, by_included = leader >= 0, (met >= 0) & ~included & ~spared
    kept = np.where(by_reference, False, included | spared | (~by_included & (keeper == nodes)))
    match = np.where(by_reference, np.where(reference, nodes, leader), np.where(by_included, met, keeper))
    match = np.where(~by_reference & (included | spared), nodes, match)
    reason = np.where(kept, "unique", "near").astype(object)
    reason[spared] = BY_HAND
    reason[included | by_included] = "included"
    reason[by_reference] = "reference"
    reason[~(pool | included)] = ""
    return Outcomes(kept & (pool | included), reason, match)


def _first(component: Ints, chosen: Bools) -> Ints:
    """For each component, its smallest node among the chosen ones (-1: none)."""
    first = np.full(len(component), -1, np.int64)
    nodes = np.flatnonzero(chosen)[::-1]
    first[component[nodes]] = nodes
    return first
