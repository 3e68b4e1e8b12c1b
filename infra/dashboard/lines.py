"""What a setting of dedup decides: the pairs around its value, and what another value would change, without a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lodeset.infra.dashboard.data import Data, Dedup
from lodeset.infra.dashboard.remembered import remembered
from lodeset.pipeline.algorithms.copies.keepers import KeeperRule
from lodeset.pipeline.algorithms.copies.thresholds import Thresholds
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import DedupDetails
from lodeset.pipeline.stages.dedup import what_if
from lodeset.pipeline.stages.dedup.what_if import Counts, Joins, Setting
from lodeset.pipeline.stages.inspect import compared

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
BINS = 80
MEANINGS = {
    "min_score": "how sure an aligned pair must be to count as copies (log-odds)",
    "threshold": "the cosine similarity above which two images of the pool count as copies",
    "reference_threshold": "the cosine similarity above which an image counts as a copy of a reference image",
    "phash_distance": "how many of 64 bits of two perceptual hashes may differ between copies",
}


@dataclass(frozen=True)
class Pair:
    """Two images with a stored pair. `limit`: the value up to which they are linked."""

    a: str
    b: str
    limit: float
    linked: bool  # at the value that is looked at


@dataclass(frozen=True)
class Bar:
    """One bar of the histogram: how many pairs have their limit from `low` to below `high`."""

    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Line:
    """A setting, and the P pairs by the value up to which each is linked.

    Attributes:
        limit: the position of each pair, [P] (`Setting.position`); -inf where no value links it, inf where all do.
        order: the rows with a finite limit, those linked at the fewest values first.
    """

    dedup: Dedup
    setting: Setting
    joins: Joins
    a: Ints
    b: Ints
    limit: Floats
    order: Ints

    def value(self, asked: float | None) -> float:
        """The value that an address asks for.

        Raises:
            LodesetError: the stored pairs cannot tell.
        """
        setting = self.setting
        if asked is None:
            return setting.now
        if not setting.low <= asked <= setting.high:
            raise LodesetError(
                f"the stored pairs can tell what {setting.name} does from {setting.low:g} to {setting.high:g}, not at {asked:g}"
            )
        return round(asked) if setting.step >= 1 else float(asked)

    def counts(self, value: float) -> Counts:
        return what_if.counts(self.joins, self.setting, value, self.dedup.spec, self.dedup.pool)

    def moved(self, value: float) -> int:
        """How many pairs join or part between the present value and this one."""
        return abs(self._at(value) - self._at(self.setting.now))

    def joins_moved(self, value: float) -> int:
        """How many joins of the forest lie between the present value and this one."""
        there, here = (self.joins.made_at(self.setting.position(one)) for one in (value, self.setting.now))
        return abs(there - here)

    def nearest(self, value: float, most: int) -> tuple[list[Pair], list[Pair]]:
        """The pairs nearest to the value: those that are linked there, and those that are not."""
        at = self._at(value)
        return self._pairs(self.order[at : at + most], True), self._pairs(
            self.order[max(0, at - most) : at][::-1], False
        )

    def _at(self, value: float) -> int:
        """How many of the pairs in `order` are not linked at a value."""
        position = np.float32(self.setting.position(value))
        return int(np.searchsorted(self.limit[self.order], position, side="left"))

    def _pairs(self, rows: Ints, linked: bool) -> list[Pair]:
        ids, sign = self.dedup.images.ids, 1 if self.setting.falls else -1
        return [
            Pair(ids[self.a[row]], ids[self.b[row]], sign * float(self.limit[row]), linked) for row in rows.tolist()
        ]

    def bars(self) -> list[Bar]:
        """How many pairs are linked up to which value, over the range of the setting."""
        setting = self.setting
        finite = self.limit[self.order] * (1 if setting.falls else -1)
        if setting.high <= setting.low:
            edges = np.array([setting.low - 0.5, setting.low + 0.5])
        elif setting.step >= 1:
            edges = np.arange(setting.low, setting.high + 2) - 0.5
        else:
            edges = np.linspace(setting.low, setting.high, BINS + 1)
        counts, _ = np.histogram(finite, edges)
        return [Bar(float(edges[n]), float(edges[n + 1]), int(count)) for n, count in enumerate(counts)]

    def always(self) -> int:
        """How many pairs every value links."""
        return int(np.isposinf(self.limit).sum())


@dataclass(frozen=True)
class Change:
    """What another value changes: rows of `what_if.DIFFERENCE`, all of them if `whole`, or else those nearest to the line."""

    table: pa.Table
    whole: bool

    def side(self, leaving: bool) -> pa.Table:
        """The images that would be dropped, or those that would be kept."""
        before, after = self.table["kept_before"], self.table["kept_after"]
        return self.table.filter(pc.and_not(before, after) if leaving else pc.and_not(after, before))

    @property
    def other_reason(self) -> int:
        """How many are dropped with either value, for another reason."""
        same = pc.equal(self.table["kept_before"], self.table["kept_after"])
        return int(pc.sum(same).as_py() or 0)


@remembered(8)
def line(data: Data, name: str | None = None) -> Line | None:
    """A setting of dedup, or the first one; None where nothing can be tried.

    Raises:
        LodesetError: this configuration has no such setting.
    """
    dedup = data.dedup
    if dedup is None or (name is None and not dedup.settings):
        return None
    setting = dedup.setting(name) if name is not None else dedup.settings[0]
    if name is None:
        return line(data, setting.name)
    artifact = data.artifact("dedup/pool")
    assert artifact is not None
    details = read_as(DedupDetails, artifact.details)
    stored = compared.stored(data.pairs)
    thresholds = Thresholds(details.threshold, details.reference_threshold)
    limit = what_if.limits(setting, dedup.spec, thresholds, dedup.images, stored)
    finite = np.flatnonzero(np.isfinite(limit))
    order = finite[np.argsort(limit[finite], kind="stable")]
    return Line(
        dedup=dedup, setting=setting, joins=data.joins(setting.name), a=stored.a, b=stored.b, limit=limit, order=order
    )


@remembered(16)
def change(data: Data, name: str, value: float, most: int) -> Change:
    """What a value of a setting changes, of the `most` joins nearest to the line."""
    found = line(data, name)
    assert found is not None
    return Change(_difference(found, value, most), found.joins_moved(value) <= most)


@remembered(2)  # each may hold a row for every tenth image of the pool
def whole_change(data: Data, name: str, value: float) -> Change:
    """All that a value of a setting changes."""
    found = line(data, name)
    assert found is not None
    return Change(_difference(found, value, None), True)


def _difference(found: Line, value: float, most: int | None) -> pa.Table:
    rules: Sequence[KeeperRule] = found.dedup.spec.keeper
    return what_if.difference(found.dedup.images, found.joins, found.setting, value, rules, most)
