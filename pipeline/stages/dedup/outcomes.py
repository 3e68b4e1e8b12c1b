"""Which images of each group of copies are kept, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcomes:
    """Of N images: whether each is kept, the reason (`unique`, `near`, `reference`, `included`), and the image that decided: itself
    where it is kept, and where a reference set holds the same bytes. What is in no pool and in no included set has the reason "".
    """

    kept: Bools
    reason: NDArray[np.object_]
    match: Ints


def outcomes(pool: Bools, reference: Bools, included: Bools, component: Ints, keeper: Ints) -> Outcomes:
    """A component with a reference image is dropped whole, one with included images keeps these, any other its `keeper` [N]."""
    nodes = np.arange(len(component))
    leader, met = _first(component, reference)[component], _first(component, included)[component]
    by_reference, by_included = leader >= 0, (met >= 0) & ~included
    kept = np.where(by_reference, False, included | (~by_included & (keeper == nodes)))
    match = np.where(by_reference, np.where(reference, nodes, leader), np.where(by_included, met, keeper))
    match = np.where(~by_reference & included, nodes, match)
    reason = np.where(kept, "unique", "near").astype(object)
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
