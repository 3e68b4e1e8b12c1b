"""What another value of a setting would drop is what dedup drops with that value: against `judge` and `verdicts` run anew."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from builders import dedup_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from looks import alike

from lodeset.pipeline.algorithms.copies.components import components
from lodeset.pipeline.algorithms.copies.keepers import RULES, keepers
from lodeset.pipeline.algorithms.copies.thresholds import Thresholds
from lodeset.pipeline.specs import DedupSpec
from lodeset.pipeline.stages.dedup.candidates import NONE, Seen
from lodeset.pipeline.stages.dedup.judging import Pairs, judge
from lodeset.pipeline.stages.dedup.run import verdicts
from lodeset.pipeline.stages.dedup.universe import Universe
from lodeset.pipeline.stages.dedup.what_if import (
    Compared,
    Setting,
    StoredPairs,
    counts,
    difference,
    joined,
    limits,
    settings_of,
)

LIMITS, SEARCHED_TO = Thresholds(pool=0.8, reference=0.7), 0.65
ROLES = {"pool": "pool", "test": "reference", "labelled": "included"}


def universe_of(rng: np.random.Generator, count: int) -> Universe:
    role = rng.choice(4, count, p=[0.7, 0.1, 0.1, 0.1])
    base = rng.integers(0, 256, (count // 3, 1024)).astype(np.uint8)
    thumbnails = base[rng.integers(0, len(base), count)]
    thumbnails[rng.random(count) < 0.1] = 7  # blank
    hashes = rng.integers(0, 2**63, count // 3).astype(np.uint64)[rng.integers(0, count // 3, count)]
    flipped = np.left_shift(np.uint64(1), rng.integers(0, 60, count).astype(np.uint64))
    area = rng.integers(1, 5, count) * 100
    return Universe(
        ids=tuple(f"{n:032x}" for n in range(count)),
        pool=role != 1,
        reference=(role == 1) | (role == 3),
        included=role == 2,
        area=area,
        side=np.full(count, 32),
        phash=hashes ^ np.where(rng.random(count) < 0.5, flipped, np.uint64(0)),
        thumbnails=thumbnails,
        flat=thumbnails.std(axis=1) < 5.0,
        set_names={},
    )


def neighbors_of(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b = np.triu_indices(count, 1)
    some = rng.random(len(a)) < 0.12
    similarity = rng.uniform(SEARCHED_TO, 1.0, some.sum()).astype(np.float32)
    return a[some].astype(np.int64), b[some].astype(np.int64), similarity


def seen_of(rng: np.random.Generator, count: int) -> Seen:
    a, b = np.triu_indices(count, 1)
    some = np.sort(rng.choice(len(a), count, replace=False))
    stands, similarity = rng.uniform(0, 0.4, count).astype(np.float32), rng.uniform(0.3, 0.9, count).astype(np.float32)
    score = rng.uniform(-2, 8, count).astype(np.float32)
    maps = np.tile(np.array([1, 0, 0, 0, 1, 0], np.float32), (count, 1))
    return Seen(a[some], b[some], np.zeros(count, np.int16), similarity, stands, score, maps)


def stored(universe: Universe, pairs: Pairs) -> tuple[Compared, StoredPairs]:
    looks = dataclasses.replace(alike(universe.area), contrast=universe.thumbnails.var(axis=1))
    by_hand = universe.pool & (np.arange(len(universe.ids)) % 5 == 0)
    images = Compared(universe.ids, universe.pool, universe.reference, universe.included, looks, by_hand=by_hand)
    limit = np.where(np.isneginf(pairs.limit), np.nan, pairs.limit)
    return images, StoredPairs(pairs.a, pairs.b, pairs.similarity, pairs.distance.astype(np.int64), limit, pairs.linked)


def decided(
    universe: Universe, images: Compared, pairs: Pairs, linked: np.ndarray | None = None
) -> dict[str, tuple[bool, str, str | None]]:
    linked = pairs.linked if linked is None else linked
    component = components(len(universe.ids), pairs.a[linked], pairs.b[linked])
    keeper = keepers(component, images.looks, wanted=images.by_hand)
    table = verdicts(universe, component, pairs, keeper, images.by_hand)
    return {r["image_id"]: (r["kept"], r["reason"], r["matched_id"]) for r in table.to_pylist()}


def check(setting: Setting, spec: DedupSpec, images: Compared, kept: StoredPairs, before: dict, after: dict) -> None:
    value = getattr(spec, setting.name)
    joins = joined(images, kept, limits(setting, SPEC[spec.verify], LIMITS, images, kept))
    told = counts(joins, setting, value, spec, int(images.pool.sum()))
    assert told.dropped == sum(not kept for kept, _, _ in after.values())
    assert told.leaked == sum(reason == "reference" for _, reason, _ in after.values())
    table = difference(images, joins, setting, value, RULES)
    found = {r["image_id"]: r for r in table.to_pylist()}
    expected = {i for i in before if before[i][:2] != after[i][:2]}
    assert set(found) == expected and len(found) == table.num_rows
    for image_id, row in found.items():
        assert (row["kept_before"], row["reason_before"], row["keeper_before"]) == before[image_id]
        assert (row["kept_after"], row["reason_after"], row["keeper_after"]) == after[image_id]
    distance = np.abs(np.array([row["limit"] for row in found.values()]) - setting.position(setting.now))
    assert (np.diff(distance) >= -1e-5).all(), "those nearest to the line come first"
    few = difference(images, joins, setting, value, RULES, most=1)
    assert set(few["image_id"].to_pylist()) <= expected and bool(few.num_rows) <= bool(expected)


SPEC = {
    verify: dataclasses.replace(
        dedup_spec(phash_distance=4, verify=verify, min_score=3.0, threshold=0.8, reference_threshold=0.7), roles=ROLES
    )
    for verify in ("none", "pixels")
}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.floats(0, 8), st.booleans())
def test_min_score(seed: int, value: float, within: bool) -> None:
    rng = np.random.default_rng(seed)
    universe, neighbors, seen = universe_of(rng, 40), neighbors_of(rng, 40), seen_of(rng, 40)
    spec = dataclasses.replace(SPEC["pixels"], within=within)
    pairs = judge(universe, neighbors, seen, LIMITS, spec)
    images, kept = stored(universe, pairs)
    [setting] = settings_of(spec, LIMITS, kept, SEARCHED_TO)
    assert setting.now == 3.0 and setting.low == 0.0
    after = judge(universe, neighbors, seen, LIMITS, dataclasses.replace(spec, min_score=value))
    asked = dataclasses.replace(spec, min_score=value)
    check(setting, asked, images, kept, decided(universe, images, pairs), decided(universe, images, after))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.floats(0.651, 1.0))
@pytest.mark.parametrize("name", ["threshold", "reference_threshold", "phash_distance"])
def test_thresholds_without_pixels(name: str, seed: int, value: float) -> None:
    rng = np.random.default_rng(seed)
    universe, neighbors = universe_of(rng, 40), neighbors_of(rng, 40)
    spec = SPEC["none"]
    pairs = judge(universe, neighbors, NONE, LIMITS, spec)
    images, kept = stored(universe, pairs)
    setting = next(one for one in settings_of(spec, LIMITS, kept, SEARCHED_TO) if one.name == name)
    asked = dataclasses.replace(spec, **{name: int(value * 100) % 5 if name == "phash_distance" else value})
    thresholds = Thresholds(asked.threshold, asked.reference_threshold)
    after = judge(universe, neighbors, NONE, thresholds, asked)
    check(setting, asked, images, kept, decided(universe, images, pairs), decided(universe, images, after))


def test_pairs_of_which_nobody_wrote_up_to_where_they_are_linked_tell_nothing() -> None:
    """As of a store of an earlier version."""
    nothing = np.full(2, np.nan, np.float32)
    linked = np.array([True, False])
    pairs = StoredPairs(np.arange(2), np.arange(2) + 1, nothing, np.arange(2), nothing, linked)
    assert settings_of(SPEC["pixels"], LIMITS, pairs, SEARCHED_TO) == []
    assert settings_of(SPEC["pixels"], LIMITS, dataclasses.replace(pairs, linked=linked & False), SEARCHED_TO)


def test_a_group_that_is_too_large_is_refused() -> None:
    count = 6
    flags = np.zeros(count, bool)
    images = Compared([f"{n:032x}" for n in range(count)], ~flags, flags, flags, alike(np.full(count, 100)))
    chain = np.arange(count - 1)
    limit = np.array([9, 7, 5, 3, 1], np.float32)
    pairs = StoredPairs(chain, chain + 1, limit, chain, limit, limit >= 3)
    spec = dataclasses.replace(SPEC["pixels"], max_group=4)
    [setting] = settings_of(spec, LIMITS, pairs, SEARCHED_TO)
    joins = joined(images, pairs, limits(setting, spec, LIMITS, images, pairs))
    told = {value: counts(joins, setting, value, spec, count) for value in (8.0, 4.0, 2.0, 0.5)}
    assert [c.dropped for c in told.values()] == [1, 3, 4, 5]
    assert [c.largest for c in told.values()] == [2, 4, 5, 6]
    assert [c.refused for c in told.values()] == [False, False, True, True]
    assert [c.groups for c in told.values()] == [1, 1, 1, 1]
    assert difference(images, joins, setting, setting.now, RULES).equals(
        pa.Table.from_pylist([], difference(images, joins, setting, setting.now, RULES).schema)
    )
