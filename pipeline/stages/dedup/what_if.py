"""What another value of one setting of dedup would drop, from the pairs that a run has stored.

With a value, the pairs are linked whose limit for that setting it does not exceed. A maximum spanning forest of all pairs by that limit
has the same components at every value, so one pass over its joins, the strongest first, counts what each value drops
(`joined`); and two values differ only in the components that the joins between them make (`difference`).

Nothing is compared anew: a value beyond those for which pairs were stored cannot be judged (`Setting.low`, `Setting.high`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import minimum_spanning_tree

from lodeset.pipeline.algorithms.copies.components import components, size_limit
from lodeset.pipeline.algorithms.copies.keepers import KeeperRule, Looks, keepers
from lodeset.pipeline.algorithms.copies.thresholds import LEAST_SCORE, Thresholds
from lodeset.pipeline.algorithms.images.blank import LOW_INFORMATION
from lodeset.pipeline.specs import DedupSpec
from lodeset.pipeline.stages.dedup.outcomes import Outcomes, outcomes

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Name = Literal["min_score", "threshold", "reference_threshold", "phash_distance"]


@dataclass(frozen=True)
class Compared:
    """The N images that some stored pair names, in the order of their ids."""

    ids: Sequence[str]
    pool: Bools
    reference: Bools
    included: Bools
    looks: Looks  # `standing`: kept by the run
    by_hand: Bools | None = None  # of the pool, to be kept beside their copies (`by_hand.keep`)

    def chosen(self, nodes: Ints) -> Compared:
        looks = Looks(**{field.name: getattr(self.looks, field.name)[nodes] for field in fields(Looks)})
        ids = [self.ids[node] for node in nodes.tolist()]
        by_hand = None if self.by_hand is None else self.by_hand[nodes]
        return Compared(ids, self.pool[nodes], self.reference[nodes], self.included[nodes], looks, by_hand=by_hand)


@dataclass(frozen=True)
class StoredPairs:
    """P pairs of nodes as `edges` holds them; NaN where a column is null."""

    a: Ints
    b: Ints
    similarity: Floats
    distance: Ints
    min_score_limit: Floats
    linked: Bools  # by the run


@dataclass(frozen=True)
class Setting:
    """A setting that decides which pairs are linked, and between which values the stored pairs can tell.

    `falls`: a lower value links more (all but `phash_distance`).
    """

    name: Name
    now: float
    low: float
    high: float
    step: float
    falls: bool = True

    def position(self, value: float) -> float:
        """What a pair's limit must reach to be linked."""
        return value if self.falls else -value


def settings_of(spec: DedupSpec, thresholds: Thresholds, pairs: StoredPairs, searched_to: float) -> list[Setting]:
    """The settings that decide in this configuration, the most useful first; `searched_to` is the cosine down to which neighbours
    are stored.
    """
    if spec.verify == "pixels":
        if (pairs.linked & np.isnan(pairs.min_score_limit)).any():
            return []  # of a version of lodeset that did not store up to which value pairs are linked
        finite = pairs.min_score_limit[np.isfinite(pairs.min_score_limit)]
        high = max(float(finite.max(initial=0.0)), spec.min_score)
        return [Setting("min_score", spec.min_score, LEAST_SCORE, float(np.ceil(high * 10 + 1) / 10), 0.1)]
    low = round(searched_to, 4)
    found = [Setting("threshold", thresholds.pool, low, 1.0, 0.001)] if spec.within else []
    if any(role == "reference" for role in spec.roles.values()):
        found.append(Setting("reference_threshold", thresholds.reference, low, 1.0, 0.001))
    if spec.phash_distance > 0:
        found.append(Setting("phash_distance", spec.phash_distance, 0, spec.phash_distance, 1, falls=False))
    return found


def limits(setting: Setting, spec: DedupSpec, thresholds: Thresholds, images: Compared, pairs: StoredPairs) -> Floats:
    """Of each pair, the position of the setting up to which it is linked, [P]; -inf where at none."""
    listed = images.reference | images.included
    allowed = listed[pairs.a] | listed[pairs.b] | spec.within
    if setting.name == "min_score":
        return np.where(allowed, np.nan_to_num(pairs.min_score_limit, nan=-np.inf, posinf=np.inf), -np.inf).astype(
            np.float32
        )
    informative = np.sqrt(images.looks.contrast) >= LOW_INFORMATION
    hashed = (pairs.distance <= spec.phash_distance) & informative[pairs.a] & informative[pairs.b]
    touches = images.reference[pairs.a] | images.reference[pairs.b]
    # A pair counts above the threshold, not at it.
    near = np.nan_to_num(np.nextafter(pairs.similarity, np.float32(-np.inf)), nan=-np.inf, neginf=-np.inf)
    fixed = np.where(near >= np.where(touches, thresholds.reference, thresholds.pool), np.inf, -np.inf)
    if setting.name == "phash_distance":
        limit = np.maximum(fixed, np.where(hashed, -pairs.distance, -np.inf))
    else:
        decides = touches == (setting.name == "reference_threshold")
        limit = np.where(hashed, np.inf, np.where(decides, near, fixed))
    return np.where(allowed, limit, -np.inf).astype(np.float32)


@dataclass(frozen=True)
class Joins:
    """The J joins of the forest, the strongest first, and what is dropped once each is made: arrays [J], and [J + 1] of counts, the
    first before any join.

    Attributes:
        dropped: images of the pool and of included sets; `leaked` are those that a reference set drops.
        groups: components that hold several images of the pool.
        largest: how many pool images the largest component holds.
    """

    limit: Floats
    a: Ints
    b: Ints
    dropped: Ints
    leaked: Ints
    groups: Ints
    largest: Ints

    def made_at(self, position: float) -> int:
        """How many joins are made where pairs must reach `position`."""
        return int(np.searchsorted(-self.limit, -np.float32(position), side="right"))


@dataclass(frozen=True)
class Counts:
    """What one value drops."""

    dropped: int
    leaked: int
    groups: int
    largest: int
    allowed: int  # pool images in one group; a run with a larger one stops

    @property
    def refused(self) -> bool:
        return self.largest > self.allowed


def counts(joins: Joins, setting: Setting, value: float, spec: DedupSpec, pool: int) -> Counts:
    """What a value of the setting drops; `pool` is the number of pool images that dedup compares."""
    at = joins.made_at(setting.position(value))
    allowed = size_limit(pool) if spec.max_group == "auto" else spec.max_group
    return Counts(
        dropped=int(joins.dropped[at]),
        leaked=int(joins.leaked[at]),
        groups=int(joins.groups[at]),
        largest=int(joins.largest[at]),
        allowed=allowed,
    )


def joined(images: Compared, pairs: StoredPairs, limit: Floats) -> Joins:
    """A maximum spanning forest of the pairs by their limits, and its running counts."""
    rows = _forest(len(images.ids), pairs, limit)
    a, b, limit = pairs.a[rows], pairs.b[rows], limit[rows]
    members = images.pool | images.included
    parent = list(range(len(images.ids)))
    pool = images.pool.astype(int).tolist()
    rowed = members.astype(int).tolist()  # images that `duplicates` has a row of
    spared = images.included if images.by_hand is None else images.included | (images.by_hand & images.pool)
    held = spared.astype(int).tolist()
    leak = images.reference.tolist()

    def kept(root: int) -> int:
        if leak[root] or not rowed[root]:
            return 0
        return held[root] or 1

    dropped = sum(rowed[node] - kept(node) for node in range(len(parent)))
    leaked = sum(rowed[node] for node in range(len(parent)) if leak[node])
    groups, largest = 0, max(pool, default=0)
    running = [(dropped, leaked, groups, largest)]

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        x, y = find(x), find(y)
        dropped += kept(x) + kept(y)
        leaked -= rowed[x] * leak[x] + rowed[y] * leak[y]
        groups -= (pool[x] > 1) + (pool[y] > 1)
        if rowed[x] < rowed[y]:
            x, y = y, x
        parent[y] = x
        pool[x] += pool[y]
        rowed[x] += rowed[y]
        held[x] += held[y]
        leak[x] = leak[x] or leak[y]
        dropped -= kept(x)
        leaked += rowed[x] * leak[x]
        groups += pool[x] > 1
        largest = max(largest, pool[x])
        running.append((dropped, leaked, groups, largest))
    columns = np.array(running, np.int64).T
    return Joins(limit, a, b, *columns)


def _forest(count: int, pairs: StoredPairs, limit: Floats) -> Ints:
    """The rows of pairs that make a maximum spanning forest, the highest limit first."""
    able = np.flatnonzero(limit > -np.inf)
    # Ranks instead of limits: these may be infinite, and a weight of 0 is no edge.
    order = able[np.lexsort((pairs.b[able], pairs.a[able], -limit[able]))]
    weight = np.arange(1, len(order) + 1, dtype=np.float64)
    tree = minimum_spanning_tree(coo_matrix((weight, (pairs.a[order], pairs.b[order])), shape=(count, count)).tocsr())
    return np.asarray(order[np.sort(tree.data.astype(np.int64)) - 1], np.int64)


DIFFERENCE = pa.schema(
    [
        ("image_id", pa.string()),
        ("kept_before", pa.bool_()),
        ("kept_after", pa.bool_()),
        ("reason_before", pa.string()),
        ("reason_after", pa.string()),
        ("keeper_before", pa.string()),  # the image that it is a copy of, null where it is kept
        ("keeper_after", pa.string()),
        ("limit", pa.float32()),  # of the join that decides, nearest to the setting's present value
    ]
)


def difference(
    images: Compared, joins: Joins, setting: Setting, value: float, rules: Sequence[KeeperRule], most: int | None = None
) -> pa.Table:
    """The images that the setting's value would treat otherwise than its present one, as `DIFFERENCE`: those nearest to the line
    first; with `most`, of as many joins only.
    """
    low, high = sorted((setting.position(setting.now), setting.position(value)))
    start, stop = joins.made_at(high), joins.made_at(low)
    if start == stop:
        return DIFFERENCE.empty_table()
    wider = components(len(images.ids), joins.a[:stop], joins.b[:stop])
    rises = setting.position(value) == high
    chosen = np.arange(start, stop)
    chosen = (chosen[::-1] if rises else chosen)[:most]
    touched = wider[joins.a[chosen]]
    roots, first = np.unique(touched, return_index=True)
    nodes = np.flatnonzero(np.isin(wider, roots))
    number = np.full(len(images.ids), -1, np.int64)
    number[nodes] = np.arange(len(nodes))
    some = images.chosen(nodes)

    def judged(made: int) -> Outcomes:
        inside = number[joins.a[:made]] >= 0
        component = components(len(nodes), number[joins.a[:made][inside]], number[joins.b[:made][inside]])
        keeper = keepers(component, some.looks, rules, some.by_hand)
        return outcomes(some.pool, some.reference, some.included, component, keeper, some.by_hand)

    narrow, wide = judged(start), judged(stop)
    before, after = (wide, narrow) if rises else (narrow, wide)
    rank = np.full(len(images.ids), len(touched), np.int64)
    rank[roots] = first
    members = some.pool | some.included
    changed = members & ((before.kept != after.kept) | (before.reason != after.reason))
    rows = np.flatnonzero(changed)
    near = rank[wider[nodes[rows]]]
    rows = rows[np.lexsort((rows, near))]
    ids = np.array(some.ids, object)

    def matched(found: Outcomes) -> list[str | None]:
        return [None if found.kept[row] else ids[found.match[row]] for row in rows]

    return pa.table(
        {
            "image_id": pa.array(ids[rows].tolist(), pa.string()),
            "kept_before": before.kept[rows],
            "kept_after": after.kept[rows],
            "reason_before": before.reason[rows].tolist(),
            "reason_after": after.reason[rows].tolist(),
            "keeper_before": pa.array(matched(before), pa.string()),
            "keeper_after": pa.array(matched(after), pa.string()),
            "limit": joins.limit[chosen[rank[wider[nodes[rows]]]]],
        },
        schema=DIFFERENCE,
    )
