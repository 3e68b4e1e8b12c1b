"""Who leaked into what: which images dedup drops because of which images of reference and included sets -> `leaks`.

Every dropped image has a row for each set that its component holds images of: with each of them that it is directly linked
to, or, where other copies link them, with the smallest one. Images of a component that a reference set meets leak into the
reference sets alone, since these are why all of it is discarded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lodeset.pipeline.dag.stage import Outcome
from lodeset.pipeline.dag.store import Part
from lodeset.pipeline.stages.dedup.judging import Pairs
from lodeset.pipeline.stages.dedup.universe import Universe
from lodeset.pipeline.tables import records

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Holders:
    """H pairs (image, set that holds it and drops copies of it), sorted; sets by their number in `names`."""

    node: Ints
    set: Ints
    names: tuple[str, ...]


def leaks_of(
    universe: Universe,
    component: Ints,
    pairs: Pairs,
    roles: Mapping[str, str],
    by_hand: NDArray[np.bool_] | None = None,
) -> pa.Table:
    """`leaks`, sorted by set, dropped image and the set's image; `roles` says of each set whether it is a reference.

    Images that are kept `by_hand` [N] are dropped because of reference sets alone.
    """
    spared = universe.included if by_hand is None else universe.included | by_hand
    met = np.zeros(len(component), bool)
    met[component[universe.reference]] = True
    by_reference = met[component]
    holders = _holders(universe, by_reference, roles)
    owned = np.zeros(len(component), bool)
    owned[component[holders.node]] = True
    dropped = np.where(by_reference, universe.pool | universe.included, universe.pool & ~spared & owned[component])

    own = np.flatnonzero(dropped & universe.reference)  # the same bytes
    a, b = pairs.a[pairs.linked], pairs.b[pairs.linked]
    victim, source = np.r_[own, a, b], np.r_[own, b, a]
    similarity = np.r_[np.ones(len(own), np.float32), np.tile(pairs.similarity[pairs.linked], 2)]
    verified = np.r_[np.ones(len(own), np.int8), np.tile(pairs.verified[pairs.linked], 2)]
    left, right = _joined(np.where(dropped[victim], source, -1), holders.node)
    direct = (holders.set[right], victim[left], holders.node[right])

    # One row for each dropped image and set of its component that no direct one tells.
    homes, first = np.unique(np.stack([component[holders.node], holders.set], axis=1), axis=0, return_index=True)
    lost = np.flatnonzero(dropped)
    one, home = _joined(component[lost], homes[:, 0])
    count = len(holders.names)
    told = np.isin(lost[one] * count + homes[home, 1], direct[1] * count + direct[0])
    one, home = one[~told], home[~told]
    through = (homes[home, 1], lost[one], holders.node[first[home]])

    which, victims, sources = (np.r_[x, y].astype(np.int64) for x, y in zip(direct, through, strict=True))
    similarity = np.r_[similarity[left], np.full(len(one), np.nan, np.float32)]
    verified = np.r_[verified[left], np.full(len(one), -1, np.int8)]
    order = np.lexsort((sources, victims, which))
    ids, names = pa.array(universe.ids, pa.string()), pa.array(holders.names, pa.string())
    return pa.table(
        {
            "set": names.take(pa.array(which[order])),
            "image_id": ids.take(pa.array(sources[order])),
            "pool_image_id": ids.take(pa.array(victims[order])),
            "similarity": pa.array(similarity[order], mask=np.isnan(similarity[order])),
            "verified": pa.array(verified[order] == 1, mask=verified[order] < 0),
        },
        schema=records.LEAKS,
    )


def with_leaks(outcome: Outcome, part: Part, leaks: pa.Table, roles: Mapping[str, str]) -> Outcome:
    """Adds the table, and by set: images dropped because of it, and of how many of its images they are copies."""
    grouped = leaks.group_by("set").aggregate([("pool_image_id", "count_distinct"), ("image_id", "count_distinct")])
    found = {r["set"]: (r["pool_image_id_count_distinct"], r["image_id_count_distinct"]) for r in grouped.to_pylist()}
    counts: dict[str, dict[str, Any]] = {}
    for name, role in sorted(roles.items()):
        if role != "pool":
            dropped, images = found.get(name, (0, 0))
            counts[name] = {"role": role, "dropped": dropped, "images": images}
    leaked = {name: one["dropped"] for name, one in counts.items() if one["role"] == "reference" and one["dropped"]}
    lost = outcome.rows.dropped.get("reference", 0)
    warning = (
        f"all {lost} images of the pool and of included sets are copies of what reference sets hold ({', '.join(leaked)}), "
        "so nothing is left: is a reference set the pool itself?"
    )
    nothing_left = outcome.rows.taken and lost == outcome.rows.taken
    warnings = [*outcome.details.get("warnings", ()), *([warning] if nothing_left else [])]
    told = {"leaks": counts, "leaked_by_set": leaked, **({"warnings": warnings} if warnings else {})}
    return replace(
        outcome, tables={**outcome.tables, "leaks": (part.files["leaks"],)}, details={**outcome.details, **told}
    )


def _holders(universe: Universe, by_reference: NDArray[np.bool_], roles: Mapping[str, str]) -> Holders:
    names = tuple(sorted(name for name, role in roles.items() if role != "pool"))
    number = {name: n for n, name in enumerate(names)}
    nodes, sets = [], []
    for node in np.flatnonzero(universe.reference | universe.included):
        for name in universe.set_names.get(universe.ids[node], ()):
            if (roles[name] == "reference") == by_reference[node]:
                nodes.append(node)
                sets.append(number[name])
    return Holders(np.array(nodes, np.int64), np.array(sets, np.int64), names)


def _joined(wanted: Ints, there: Ints) -> tuple[Ints, Ints]:
    """All (i, j) with wanted[i] == there[j]; `there` is sorted."""
    low, high = np.searchsorted(there, wanted, "left"), np.searchsorted(there, wanted, "right")
    counts = high - low
    rows = np.repeat(np.arange(len(wanted)), counts)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
