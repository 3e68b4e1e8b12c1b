"""A run beside another one, for the report: both funnels, what differs in their settings, and which images changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.difference import CHANGES, Cause, Difference, causes, difference
from lodeset.infra.dashboard.making import found
from lodeset.infra.looking.held import Held
from lodeset.infra.report.collect import step
from lodeset.infra.report.header import flow
from lodeset.infra.report.section import Contents, Section, stored
from lodeset.infra.session import Opened
from lodeset.pipeline.dag.stage import Stage

EXAMPLES = 10  # images of each kind of change
CELLS = 20  # changes of outcome


@dataclass(frozen=True)
class Changed:
    """Images that changed in one way: how many, and some of them with what changed."""

    title: str
    images: int
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Compared:
    """Two runs.

    Attributes:
        flow: along the way of the pool: what, and the numbers of the earlier and of the later run (None: it did not get there).
        outcomes: the most frequent changes from one outcome to another one.
        not_inspected: runs whose images cannot be compared before `lodeset inspect` has read them.
    """

    number: int
    before: int
    flow: tuple[tuple[str, int | None, int | None], ...]
    causes: tuple[Cause, ...]
    changed: tuple[Changed, ...] = ()
    outcomes: tuple[tuple[str, str, int], ...] = ()
    not_inspected: tuple[int, ...] = ()


def compared(opened_: Opened, shown: Held, before: Held) -> Compared:
    """`shown` is the later run. Both have a number."""
    assert shown.run is not None
    assert before.run is not None
    numbers = shown.run.number, before.run.number
    flows = [dict(_flow(held)) for held in (before, shown)]
    way = [what for what, _ in _flow(shown)] + [what for what in flows[0] if what not in flows[1]]
    told: dict[str, Any] = {
        "number": numbers[0],
        "before": numbers[1],
        "flow": tuple((what, flows[0].get(what), flows[1].get(what)) for what in way),
        "causes": tuple(causes(before.artifacts, shown.artifacts)),
    }
    made = {number: found(opened_, number) for number in sorted(numbers)}
    missing = tuple(number for number, one in made.items() if one is None)
    if missing:
        return Compared(**told, not_inspected=missing)
    earlier, later = made[numbers[1]], made[numbers[0]]
    assert earlier is not None
    assert later is not None
    with opened(opened_.store, earlier) as first, opened(opened_.store, later) as second:
        differs = difference(first, second)
        changed = tuple(_changed(differs, name, first, second) for name, n in differs.counts.items() if n)
        cells = sorted(
            ((was, now, n) for (was, now), n in differs.matrix.items() if was != now), key=lambda one: -one[2]
        )
    return Compared(**told, changed=changed, outcomes=tuple(cells[:CELLS]))


def _flow(held: Held) -> list[tuple[str, int]]:
    stages: Mapping[str, Stage] = held.stages({})
    return flow([step(stage, held.artifacts.get(id_)) for id_, stage in stages.items()])


def _changed(differs: Difference, name: str, before: Data, after: Data) -> Changed:
    rows = differs.which(name)
    chosen = rows[np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).astype(int)]
    examples = []
    for row in chosen.tolist():
        data, at = (after, differs.after[row]) if differs.after[row] >= 0 else (before, differs.before[row])
        was, now = differs.outcomes[differs.was[row]], differs.outcomes[differs.now[row]]
        told = now if was == now else f"{was} → {now}"
        examples.append((data.image_ids(np.array([at]))[0], told.replace("_", " ")))
    return Changed(CHANGES[name][0], len(rows), tuple(examples))


def section(told: Compared) -> Section:
    """The section of the page that shows it."""
    pictures = [image_id for changed in told.changed for image_id, _ in changed.examples]
    return Section(
        id="compared",
        title=f"Compared with run {told.before}",
        collect=lambda finished: Contents(values={"compared": told}, pictures=pictures),
        template=stored("compared.html.jinja"),
    )
