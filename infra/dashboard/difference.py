"""Two runs image by image: which images came and went, which changed their outcome, group, cluster or shard, and because of what."""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lodeset.infra.dashboard.data import Data
from lodeset.pipeline.dag.decisions import differences
from lodeset.pipeline.dag.stage import PREVIOUS, read_as
from lodeset.pipeline.dag.store import Artifact
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import WriteShardsDetails

Bools = NDArray[np.bool_]
Ints = NDArray[np.int32]
ABSENT = "absent"  # the outcome of an image that a run does not know
RESULT = ("in_shard", "selected")  # outcomes of images that a run chose
# What can have changed -> words for it, and the stage that decides it.
CHANGES: Mapping[str, tuple[str, str]] = {
    "entered": ("entered the selection", "write_shards/all"),
    "left": ("left the selection", "write_shards/all"),
    "new": ("new in the sources", "ingest/pool"),
    "gone": ("gone from the sources", "ingest/pool"),
    "outcome": ("another outcome", "write_shards/all"),
    "group": ("another group", "dedup/pool"),
    "cluster": ("another cluster", "cluster/pool"),
    "shard": ("another shard", "write_shards/all"),
}
_ROWS = """
SELECT b.row AS before_row, a.row AS after_row,
    b.group_id IS DISTINCT FROM a.group_id OR b.group_size IS DISTINCT FROM a.group_size AS regrouped
FROM before b FULL JOIN after a ON a.image_id = b.image_id AND a.set = b.set
"""
# Stages that say what drops an image, in the order in which they judge.
_JUDGES = {
    "filter": "filter/pool",
    "embed": "embed/pool",
    "dedup": "dedup/pool",
    "semdedup": "semdedup/pool",
    "retrieve": "retrieve/all",
}


@dataclass(frozen=True)
class Difference:
    """What differs between two runs: an entry for each image of each set that either has, in no order.

    Attributes:
        before, after: the row of `inspected` in each run, -1 where it is not there.
        outcomes: the names of outcomes; `was` and `now` are numbers of these.
        regrouped: in both runs, with another group or one of another size.
        reclustered: in a cluster of both runs, in another one. Nobody is where `comparable` is false, since numbers of
            clusters mean nothing across two fits.
        moved: in a shard of both runs, in another one.
    """

    before: Ints
    after: Ints
    outcomes: tuple[str, ...]
    was: NDArray[np.int32]
    now: NDArray[np.int32]
    regrouped: Bools
    reclustered: Bools
    moved: Bools
    comparable: bool

    @functools.cached_property
    def matrix(self) -> dict[tuple[str, str], int]:
        """How many images went from one outcome to another one, or kept theirs."""
        size = len(self.outcomes)
        counts = np.bincount(self.was.astype(np.int64) * size + self.now, minlength=size * size)
        return {
            (self.outcomes[n // size], self.outcomes[n % size]): int(counts[n]) for n in np.flatnonzero(counts).tolist()
        }

    def which(self, change: str = "", was: Sequence[str] = (), now: Sequence[str] = ()) -> NDArray[np.int64]:
        """The entries with this change, and with one of these outcomes; those of the later run first, by image_id.

        Raises:
            LodesetError: no such change.
        """
        if change and change not in self._changes:
            raise LodesetError(f"change={change[:80]}: choose one of {', '.join(self._changes)}")
        found = self._changes[change] if change else np.ones(len(self.before), bool)
        for wanted, numbers in ((was, self.was), (now, self.now)):
            if wanted:
                found = found & np.array([name in wanted for name in self.outcomes])[numbers]
        rows = np.flatnonzero(found)
        # Each table is sorted by image_id.
        return rows[np.lexsort((self.before[rows], self.after[rows], self.after[rows] < 0))]

    @functools.cached_property
    def _changes(self) -> dict[str, Bools]:
        """Which entries have each change of CHANGES."""
        both = (self.before >= 0) & (self.after >= 0)
        chosen = np.array([name in RESULT for name in self.outcomes])
        was, now = chosen[self.was], chosen[self.now]
        return {
            "entered": ~was & now,
            "left": was & ~now,
            "new": self.before < 0,
            "gone": self.after < 0,
            "outcome": both & (self.was != self.now),
            "group": self.regrouped,
            "cluster": self.reclustered,
            "shard": self.moved,
        }

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """How many images each change concerns."""
        return {name: int(changed.sum()) for name, changed in self._changes.items()}


def difference(before: Data, after: Data) -> Difference:
    """Compares two runs of one store."""
    if before.inspected.artifact.fingerprint == after.inspected.artifact.fingerprint:
        own = np.arange(before.details.images, dtype=np.int32)
        rows = pa.table({"before_row": own, "after_row": own, "regrouped": np.zeros(len(own), bool)})
    else:
        rows = before.with_later(after, _ROWS)
    old, new = (
        np.asarray(rows[name].combine_chunks().fill_null(-1).to_numpy()) for name in ("before_row", "after_row")
    )
    both = (old >= 0) & (new >= 0)
    outcomes, was, now = _alike(before.codes("outcome"), after.codes("outcome"), old, new, ABSENT)
    comparable = _centroids(before) == _centroids(after)
    reclustered = np.zeros(len(old), bool)
    if comparable:
        clusters = before.column("cluster")[old], after.column("cluster")[new]
        reclustered = both & ~np.isnan(clusters[0]) & ~np.isnan(clusters[1]) & (clusters[0] != clusters[1])
    shards, left, right = _alike(_shards(before), _shards(after), old, new, "")
    nowhere = shards.index("")
    moved = both & (left != right) & (left != nowhere) & (right != nowhere)
    regrouped = both & np.asarray(rows["regrouped"].to_numpy())
    return Difference(old, new, outcomes, was, now, regrouped, reclustered, moved, comparable)


Coded = tuple[tuple[str, ...], NDArray[np.int32]]


def _alike(
    first: Coded, second: Coded, before: Ints, after: Ints, absent: str
) -> tuple[tuple[str, ...], NDArray[np.int32], NDArray[np.int32]]:
    """Names of both, and the number of each entry's name in each."""
    names = tuple(sorted({*first[0], *second[0], absent}))
    number = {name: n for n, name in enumerate(names)}
    found = []
    for (known, codes), rows in ((first, before), (second, after)):
        table = np.array([*(number[name] for name in known), number[absent]], np.int32)  # -1 is the last: null
        found.append(np.where(rows >= 0, table[codes[rows]] if len(codes) else number[absent], number[absent]))
    return names, found[0].astype(np.int32), found[1].astype(np.int32)


def _shards(data: Data) -> Coded:
    """Shards by their path in the store: an index may name those of the run before it as `../folder/shard`."""
    names, codes = data.codes("shard")
    written = data.artifact("write_shards/all")
    folder = read_as(WriteShardsDetails, written.details).folder if written is not None else ""
    return tuple(posixpath.normpath(posixpath.join(folder, name)) for name in names), codes


def _centroids(data: Data) -> Any:
    fitted = data.artifact("fit_clusters/pool")
    return fitted.content if fitted is not None else None


# -- because of what


@dataclass(frozen=True)
class Cause:
    """A stage that differs between two runs.

    Attributes:
        settings: what differs in its configuration, in words; empty if only what it reads differs.
        reads: the stages that it read something else of.
        alike: whether both runs have the same result of it nevertheless.
    """

    stage: str
    settings: tuple[str, ...]
    reads: tuple[str, ...]
    alike: bool = False


def causes(before: Mapping[str, Artifact], after: Mapping[str, Artifact]) -> list[Cause]:
    """The stages that differ, in the order of the DAG."""
    found = []
    changed = {
        id_
        for id_ in {**before, **after}
        if id_ not in before or id_ not in after or before[id_].fingerprint != after[id_].fingerprint
    }
    for id_ in dict.fromkeys((*after, *before)):
        if id_ not in changed:
            continue
        old, new = before.get(id_), after.get(id_)
        reads = _changed_inputs(old, new)
        settings: tuple[str, ...]
        if old is None:
            settings = ("only in the later run",)
        elif new is None:
            settings = ("only in the earlier run",)
        else:
            words = [f"version {old.version} -> {new.version}"] if old.version != new.version else []
            words += differences(old.config, new.config)
            settings = tuple(_plain(id_, one) for one in words)
            if not settings and not reads:
                settings = ("made again from other files",)
        alike = old is not None and new is not None and bool(old.content) and old.content == new.content
        found.append(Cause(id_, settings, tuple(sorted(reads)), alike))
    return found


def _changed_inputs(old: Artifact | None, new: Artifact | None) -> set[str]:
    """The stages that a stage read something else of. What it only goes on from is none of them."""
    told = [
        {role: (one["stage"], one.get("identity")) for role, one in (made.inputs if made else {}).items()}
        for made in (old, new)
    ]
    if old is None or new is None:
        return set()
    roles = {role for role in {**told[0], **told[1]} if role != PREVIOUS and told[0].get(role) != told[1].get(role)}
    return {of[role][0] for of in told for role in roles if role in of}


def _plain(stage: str, words: str) -> str:
    if stage.startswith("ingest/") and words == "listing changed":
        return "its source files have changed"
    return words.replace(" -> ", " → ")


def responsible(causes_: Sequence[Cause], deciding: Iterable[str], made: Mapping[str, Artifact]) -> list[Cause]:
    """Those with settings of their own, and another result, on which one of the deciding stages depends."""
    wanted, left = set[str](), list(deciding)
    while left:
        id_ = left.pop()
        if id_ in wanted:
            continue
        wanted.add(id_)
        if id_ in made:
            left += [told["stage"] for role, told in made[id_].inputs.items() if role != PREVIOUS and told.get("stage")]
    return [cause for cause in causes_ if cause.settings and not cause.alike and cause.stage in wanted]


def deciding(was: str, now: str, droppers: Mapping[str, str]) -> str:
    """The stage that decides between two outcomes: the first of those that made them. `droppers` are the values of `dropped_by`
    of outcomes.
    """
    if ABSENT in (was, now):
        return "ingest/pool"
    judges = [id_ for name, id_ in _JUDGES.items() if name in (droppers.get(was), droppers.get(now))]
    return judges[0] if judges else "write_shards/all"


def droppers(data: Data) -> dict[str, str]:
    """The stage that drops images of each outcome; empty where none does."""
    outcomes, of = data.codes("outcome")
    stages, dropped_by = data.codes("dropped_by")
    numbers, first = np.unique(of, return_index=True)
    return {
        outcomes[number]: stages[dropped_by[row]] if dropped_by[row] >= 0 else ""
        for number, row in zip(numbers.tolist(), first.tolist(), strict=True)
        if number >= 0
    }
