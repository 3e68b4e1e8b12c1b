"""Who leaked into what, on random universes: against plain loops, and against what dedup drops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from looks import alike

from lodeset.pipeline.algorithms.copies.components import components
from lodeset.pipeline.algorithms.copies.keepers import keepers
from lodeset.pipeline.dag.stage import Outcome
from lodeset.pipeline.dag.store import File, Part, Rows
from lodeset.pipeline.stages.dedup.judging import Pairs
from lodeset.pipeline.stages.dedup.leaks import leaks_of, with_leaks
from lodeset.pipeline.stages.dedup.run import verdicts
from lodeset.pipeline.stages.dedup.universe import Universe

ROLES = {"pool": "pool", "r1": "reference", "r2": "reference", "r3": "reference", "i1": "included", "i2": "included"}
HOLDERS = [(), (), (), ("r1",), ("r2",), ("r1", "r2"), ("i1",), ("i2",), ("i1", "i2"), ("i1", "r1")]
Member = tuple[bool, tuple[str, ...]]


def universe_of(members: list[Member]) -> Universe:
    count = len(members)
    ids = tuple(f"{n:032x}" for n in range(count))

    def role(name: str) -> np.ndarray:
        return np.array([any(ROLES[s] == name for s in sets) for _, sets in members], bool).reshape(count)

    return Universe(
        ids=ids,
        pool=np.array([in_pool or not sets for in_pool, sets in members], bool).reshape(count),
        reference=role("reference"),
        included=role("included"),
        area=np.ones(count, np.int64),
        side=np.ones(count, np.int64),
        phash=np.zeros(count, np.uint64),
        thumbnails=np.zeros((count, 1024), np.uint8),
        flat=np.zeros(count, bool),
        set_names={i: sets for i, (_, sets) in zip(ids, members, strict=True) if sets},
    )


def pairs_of(links: dict[tuple[int, int], tuple[float | None, int, bool]]) -> Pairs:
    a, b = (np.array([pair[n] for pair in links], np.int64) for n in (0, 1))
    told = list(links.values())
    similarity = np.array([np.nan if s is None else s for s, _, _ in told], np.float32)
    verified, linked = np.array([v for _, v, _ in told], np.int8), np.array([x for _, _, x in told], bool)
    zeros, unknown = np.zeros(len(a), np.int16), np.full(len(a), np.nan, np.float32)
    return Pairs(
        a,
        b,
        similarity,
        zeros,
        zeros > 0,
        verified,
        zeros,
        unknown,
        np.tile(unknown[:, None], 6),
        zeros - 1,
        unknown,
        linked,
        unknown,
    )


def by_loops(
    members: list[Member], links: dict[tuple[int, int], tuple[float | None, int, bool]], component: np.ndarray
) -> dict[tuple[str, int, int], tuple[float | None, bool | None]]:
    """(set, its image, dropped image) -> similarity, verified."""
    expected: dict[tuple[str, int, int], tuple[float | None, bool | None]] = {}
    for victim, (in_pool, sets) in enumerate(members):
        peers = [n for n in range(len(members)) if component[n] == component[victim]]
        is_reference = any(ROLES[s] == "reference" for n in peers for s in members[n][1])
        role = "reference" if is_reference else "included"
        included = any(ROLES[s] == "included" for s in sets)
        if not (in_pool or not sets or included) or (included and not is_reference):
            continue
        for name in (s for s, r in ROLES.items() if r == role):
            holders = [n for n in peers if name in members[n][1]]
            direct: dict[int, tuple[float | None, bool | None]] = {}
            for n in holders:
                known = (1.0, 1, True) if n == victim else links.get((min(n, victim), max(n, victim)), (None, 0, False))
                if known[2]:
                    direct[n] = (known[0], None if known[1] < 0 else known[1] == 1)
            for n, told in (direct or dict.fromkeys(holders[:1], (None, None))).items():
                expected[name, n, victim] = told
    return expected


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_leaks_are_those_of_plain_loops_and_tell_every_drop(data: st.DataObject) -> None:
    members = data.draw(st.lists(st.tuples(st.booleans(), st.sampled_from(HOLDERS)), max_size=14))
    node = st.integers(0, max(0, len(members) - 1))
    drawn = data.draw(
        st.lists(
            st.tuples(node, node, st.sampled_from([0.5, 0.75, None]), st.sampled_from([-1, 1]), st.booleans()),
            max_size=16,
        )
    )
    links = {(min(a, b), max(a, b)): (s, v if x else 0, x) for a, b, s, v, x in drawn if a != b}
    universe, pairs = universe_of(members), pairs_of(links)
    component = components(len(members), pairs.a[pairs.linked], pairs.b[pairs.linked])
    table = leaks_of(universe, component, pairs, ROLES)
    rows = table.to_pylist()
    found = {
        (r["set"], int(r["image_id"], 16), int(r["pool_image_id"], 16)): (r["similarity"], r["verified"]) for r in rows
    }
    assert found == by_loops(members, links, component) and len(found) == len(rows)
    assert [(r["set"], r["pool_image_id"], r["image_id"]) for r in rows] == sorted(
        (r["set"], r["pool_image_id"], r["image_id"]) for r in rows
    )
    dropped = [
        r
        for r in verdicts(universe, component, pairs, keepers(component, alike(universe.area))).to_pylist()
        if r["reason"] in ("reference", "included") and not r["kept"]
    ]
    assert {r["pool_image_id"] for r in rows} == {r["image_id"] for r in dropped}
    for row in dropped:
        mine = {ROLES[r["set"]] for r in rows if r["pool_image_id"] == row["image_id"]}
        assert mine == {row["reason"]}


def told(members: list[Member], dropped: dict[str, int], links: list[tuple[int, int]]) -> Any:
    universe = universe_of(members)
    pairs = pairs_of(dict.fromkeys(links, (0.9, 1, True)))
    component = components(len(members), pairs.a, pairs.b)
    table = leaks_of(universe, component, pairs, ROLES)
    taken = sum(in_pool or not sets for in_pool, sets in members)
    outcome = Outcome({}, Rows(taken, taken - sum(dropped.values()), dropped), details={"groups": 1})
    return with_leaks(outcome, Part("k", {"leaks": File("x", table.num_rows, 1, "")}), table, ROLES).details


def test_counts_by_set_hold_every_set() -> None:
    members: list[Member] = [
        (True, ()),
        (True, ()),
        (False, ("r1",)),
        (False, ("r2",)),
        (True, ()),
        (False, ("i1",)),
        (True, ()),
    ]
    details = told(members, {"reference": 2, "included": 1}, [(0, 1), (1, 2), (2, 3), (4, 5)])
    assert details["leaks"] == {
        "i1": {"role": "included", "dropped": 1, "images": 1},
        "i2": {"role": "included", "dropped": 0, "images": 0},
        "r1": {"role": "reference", "dropped": 2, "images": 1},
        "r2": {"role": "reference", "dropped": 2, "images": 1},
        "r3": {"role": "reference", "dropped": 0, "images": 0},
    }
    assert details["leaked_by_set"] == {"r1": 2, "r2": 2} and details["groups"] == 1 and "warnings" not in details


def test_a_reference_set_that_is_the_pool_is_told() -> None:
    details = told([(True, ("r1",))] * 3, {"reference": 3}, [])
    assert details["leaks"]["r1"] == {"role": "reference", "dropped": 3, "images": 3}
    assert details["warnings"] == [
        "all 3 images of the pool and of included sets are copies of what reference sets hold (r1), so nothing is left: "
        "is a reference set the pool itself?"
    ]


def test_without_sets_there_are_no_leaks() -> None:
    universe, pairs = universe_of([(True, ())] * 3), pairs_of({(0, 1): (0.9, 1, True)})
    table = leaks_of(universe, np.array([0, 0, 2]), pairs, {"pool": "pool"})
    assert isinstance(table, pa.Table) and table.num_rows == 0
