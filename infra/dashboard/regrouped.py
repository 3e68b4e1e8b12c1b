"""What a list by hand changes in the groups of copies: the images that dedup would keep instead, from the pairs that the run stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.groups import groups
from lodeset.pipeline.algorithms.copies.components import components
from lodeset.pipeline.algorithms.copies.keepers import keepers
from lodeset.pipeline.stages.dedup.outcomes import Outcomes, outcomes
from lodeset.pipeline.stages.dedup.what_if import Compared

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Moved:
    """An image that the list does not name, and that dedup would keep, or drop, because of it. `other`: the image that was kept in its
    place until now, or that would be.
    """

    image_id: str
    other: str


@dataclass(frozen=True, kw_only=True)
class Regrouped:
    """The images that come back, and those that leave, by image_id."""

    back: tuple[Moved, ...] = ()
    leave: tuple[Moved, ...] = ()


def regrouped(data: Data, listed: Sequence[str], *, drop: bool) -> Regrouped:
    """What dedup decides otherwise about the copies of listed images of the pool, which are dropped before it or, if not `drop`, kept
    by hand. Images that the run has not compared have no copies here.
    """
    dedup, linked = data.dedup, groups(data)
    if dedup is None or linked is None:
        return Regrouped()
    named = np.zeros(len(dedup.images.ids), bool)
    named[[node for node in map(dedup.node, listed) if node is not None]] = True
    named &= dedup.images.pool
    nodes = np.flatnonzero(np.isin(linked.group, np.unique(linked.group[named])))
    some, named = dedup.images.chosen(nodes), named[nodes]
    number = np.full(len(linked.group), -1, np.int64)
    number[nodes] = np.arange(len(nodes))
    inside = number[linked.a] >= 0
    a, b = number[linked.a[inside]], number[linked.b[inside]]

    def judged(pool: NDArray[np.bool_], by_hand: NDArray[np.bool_] | None, there: NDArray[np.bool_]) -> Outcomes:
        both = there[a] & there[b]
        component = components(len(nodes), a[both], b[both])
        keeper = keepers(component, some.looks, dedup.spec.keeper, by_hand)
        return outcomes(pool, some.reference, some.included, component, keeper, by_hand)

    everything = np.ones(len(nodes), bool)
    before = judged(some.pool, some.by_hand, everything)
    if drop:
        pool = some.pool & ~named
        by_hand = None if some.by_hand is None else some.by_hand & ~named
        after = judged(pool, by_hand, pool | some.reference | some.included)
    else:
        after = judged(some.pool, named if some.by_hand is None else some.by_hand | named, everything)
    return Regrouped(
        back=_moved(some, np.flatnonzero(~named & ~before.kept & after.kept), before),
        leave=_moved(some, np.flatnonzero(~named & before.kept & ~after.kept), after),
    )


def _moved(images: Compared, rows: Ints, matched: Outcomes) -> tuple[Moved, ...]:
    return tuple(Moved(images.ids[row], images.ids[int(matched.match[row])]) for row in rows.tolist())
