"""What dedup decides, on a planted universe: copies of five pictures, some in reference and included sets."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from builders import dedup_spec
from looks import alike

from lodeset.pipeline.algorithms.copies.components import components
from lodeset.pipeline.algorithms.copies.keepers import keepers
from lodeset.pipeline.algorithms.copies.thresholds import Thresholds
from lodeset.pipeline.algorithms.copies.views import ORIENTATIONS
from lodeset.pipeline.errors import GateError
from lodeset.pipeline.stages.dedup.candidates import NONE, Seen
from lodeset.pipeline.stages.dedup.judging import judge
from lodeset.pipeline.stages.dedup.leaks import leaks_of
from lodeset.pipeline.stages.dedup.run import guard, verdicts
from lodeset.pipeline.stages.dedup.universe import Universe

LIMITS = Thresholds(pool=0.9, reference=0.8)
# picture of each node; the nodes that a reference or an included set holds
PICTURES = np.array([0, 0, 0, 1, 1, 2, 2, 3, 4])
REFERENCE = [4]
INCLUDED = [6]
AREAS = np.array([100, 300, 200, 100, 100, 100, 100, 100, 100])


def planted() -> tuple[Universe, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 1024)).astype(np.uint8)
    hashes = rng.integers(0, 2**63, 5).astype(np.uint64)
    count = len(PICTURES)
    reference, included = np.zeros(count, bool), np.zeros(count, bool)
    reference[REFERENCE] = included[INCLUDED] = True
    included &= ~reference
    ids = tuple(f"{n:032x}" for n in range(count))
    universe = Universe(
        ids=ids,
        pool=~(reference | included),
        reference=reference,
        included=included,
        area=AREAS,
        side=np.full(count, 32),
        phash=hashes[PICTURES],
        thumbnails=pictures[PICTURES],
        flat=np.zeros(count, bool),
        set_names={ids[4]: ("test",), ids[6]: ("labelled",)},
    )
    a, b = np.triu_indices(count, 1)
    similarity = np.where(PICTURES[a] == PICTURES[b], 0.97, 0.1).astype(np.float32)
    return universe, (a.astype(np.int64), b.astype(np.int64), similarity)


def decide(within: bool, method: str = "pixels") -> dict[int, tuple[bool, str]]:
    universe, neighbors = planted()
    spec = dedup_spec(phash_distance=4, verify=method, within=within, min_score=3.0)
    pairs = judge(universe, neighbors, NONE, LIMITS, spec)
    component = components(len(universe.ids), pairs.a[pairs.linked], pairs.b[pairs.linked])
    keeper = keepers(component, alike(universe.area))
    table = verdicts(universe, component, pairs, keeper).to_pylist()
    return {int(row["image_id"], 16): (row["kept"], row["reason"]) for row in table}


@pytest.mark.parametrize("method", ["pixels", "none"])
def test_one_of_a_group_stays_and_sets_come_first(method: str) -> None:
    decided = decide(within=True, method=method)
    assert decided[1] == (True, "unique") and decided[0] == decided[2] == (False, "near")
    assert decided[3] == (False, "reference")
    assert decided[5] == (False, "included") and decided[6] == (True, "included")
    assert decided[7] == decided[8] == (True, "unique")


def test_the_pool_can_keep_its_own_copies() -> None:
    decided = decide(within=False)
    assert all(decided[n] == (True, "unique") for n in (0, 1, 2, 7, 8))
    assert decided[3] == (False, "reference") and decided[5] == (False, "included")


def test_copies_are_kept_by_hand_unless_a_reference_set_holds_one() -> None:
    """Nodes 0 to 2, 3 and 4, 5 and 6 are copies; 4 is a reference image, 6 an included one."""
    universe, neighbors = planted()
    spec = dedup_spec(verify="none")
    pairs = judge(universe, neighbors, NONE, LIMITS, spec)
    component = components(len(universe.ids), pairs.a[pairs.linked], pairs.b[pairs.linked])
    by_hand = np.isin(np.arange(len(universe.ids)), [0, 2, 3, 5, 7])
    keeper = keepers(component, alike(universe.area), wanted=by_hand)
    decided = {
        int(row["image_id"], 16): (row["kept"], row["reason"], row["matched_id"])
        for row in verdicts(universe, component, pairs, keeper, by_hand).to_pylist()
    }
    kept = (True, "by_hand", None)
    assert decided[0] == decided[2] == decided[5] == decided[7] == kept
    assert decided[1] == (False, "near", universe.ids[2]), "the larger one of those that are kept, not the largest"
    assert decided[3] == (False, "reference", universe.ids[4])
    assert decided[6] == (True, "included", None) and decided[8] == (True, "unique", None)
    roles = {"pool": "pool", "test": "reference", "labelled": "included"}
    leaks = leaks_of(universe, component, pairs, roles, by_hand).to_pylist()
    assert [(row["set"], row["pool_image_id"]) for row in leaks] == [("test", universe.ids[3])]


@pytest.mark.parametrize(("max_group", "stops"), [("auto", True), (119, True), (120, False)])
def test_a_group_that_is_too_large_stops_the_run_unless_it_is_expected(max_group: str | int, stops: bool) -> None:
    component = np.r_[np.zeros(120, np.int64), np.arange(120, 300)]
    pool = np.ones(300, bool)
    for method, knob in (("pixels", "min_score"), ("none", "threshold")):
        told = rf"120 of 300 .* dedup\.{knob}.* dedup\.max_group: 120"
        spec = dedup_spec(max_group=max_group, verify=method, phash_distance=4, min_score=3.0)
        with pytest.raises(GateError, match=told) if stops else nullcontext():
            guard(pool, component, LIMITS, spec)


def test_aligned_pairs_are_judged_by_score_surroundings_and_role() -> None:
    """Nodes 3, 7 and 8 hold different pictures; 4 is a reference image."""
    universe, (a, b, _) = planted()
    strangers = (a, b, np.zeros(len(a), np.float32))

    def linked(first: int, second: int, score: float, similarity: float, out: float) -> bool:
        seen = Seen(
            np.array([first]),
            np.array([second]),
            np.array([2], np.int16),
            np.array([similarity], np.float32),
            np.array([out], np.float32),
            np.array([score], np.float32),
            np.arange(6, dtype=np.float32)[None],
        )
        spec = dedup_spec(phash_distance=0, min_score=3.0)
        pairs = judge(universe, strangers, seen, LIMITS, spec)
        (row,) = np.flatnonzero((pairs.a == first) & (pairs.b == second))
        assert pairs.score[row] == np.float32(score) and pairs.maps[row].tolist() == [0, 1, 2, 3, 4, 5]
        assert ORIENTATIONS[pairs.orientation[row]].name == "turn_90" and pairs.verified[row] == pairs.linked[row]
        return bool(pairs.linked[row])

    assert linked(7, 8, score=3.1, similarity=0.9, out=0.3)
    assert not linked(7, 8, score=2.9, similarity=0.9, out=0.3)
    assert not linked(7, 8, score=9, similarity=0.9, out=0.2)  # of a kind of picture
    assert linked(7, 8, score=9, similarity=0.7, out=0.2)  # little else is like them
    assert linked(4, 8, score=3.1, similarity=0.9, out=0.1)  # a reference image
    assert not linked(4, 8, score=2.9, similarity=0.9, out=0.1)
