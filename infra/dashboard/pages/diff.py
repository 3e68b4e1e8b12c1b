"""Two runs beside each other, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from lodeset.infra.dashboard import render
from lodeset.infra.dashboard.chosen import NotInspectedError, data_of
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.difference import (
    ABSENT,
    CHANGES,
    RESULT,
    Difference,
    causes,
    deciding,
    difference,
    droppers,
    responsible,
)
from lodeset.infra.dashboard.gallery import Thumb, thumb_of
from lodeset.infra.dashboard.pages.export import Format, download
from lodeset.infra.dashboard.render import address
from lodeset.infra.dashboard.site import Site, TheSite
from lodeset.infra.looking import looking
from lodeset.pipeline.dag.manifests import Run
from lodeset.pipeline.dag.runs import artifacts_of, newest_first

router = APIRouter()

RUNS_OFFERED = 50
PAGE = 60

RunNumber = Annotated[int | None, Query(ge=1)]
_SHOWN = ("image_id", "set", "outcome", "cluster", "group_size", "shard", "dropped_by", "picture_row", "row")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of the table of outcomes; `same`: the outcome stayed."""

    was: str
    now: str
    count: int
    same: bool


@router.get("/diff")
def diff(
    request: Request,
    site: TheSite,
    run: RunNumber = None,
    with_: Annotated[int | None, Query(alias="with", ge=1)] = None,
    change: str = "",
    was: str = "",
    now: str = "",
    start: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """`run` is the later one; `with` the earlier one, by default the run before it."""
    store, name = site.opened.store, site.opened.config.name
    shown = looking.held(site.opened, run or site.number).run
    runs = list(islice(newest_first(store, name), RUNS_OFFERED))
    number = with_ or _before(shown, runs)
    if shown is None or number is None:
        return render.page(request, "diff.html.jinja", runs=runs, later=shown, earlier=None, absent=None)
    earlier = store.run(number)
    made = artifacts_of(store, earlier), artifacts_of(store, shown)
    told = causes(*made)
    common: dict[str, Any] = {"runs": runs, "later": shown, "earlier": earlier, "causes": told}
    try:
        before, after = data_of(request, earlier.number), data_of(request, shown.number)
    except NotInspectedError as error:
        return render.page(request, "diff.html.jinja", **common, absent=error.run)
    found = _difference(request, before, after)
    counts = found.counts
    if not (change or was or now):
        change = next((one for one in CHANGES if counts[one]), "")
    rows = found.which(change, [was] if was else (), [now] if now else ())
    deciders = [CHANGES[change][1]] if change else []
    if was and now and was != now:
        deciders.append(deciding(was, now, {**droppers(before), **droppers(after)}))
    return render.page(
        request,
        "diff.html.jinja",
        **common,
        absent=None,
        counts=counts,
        changes=CHANGES,
        comparable=found.comparable,
        names=[one for one in _ordered(found.outcomes) if one in {x for pair in found.matrix for x in pair}],
        cells={
            pair: Cell(was=pair[0], now=pair[1], count=n, same=pair[0] == pair[1]) for pair, n in found.matrix.items()
        },
        unchanged=not any(counts.values()),
        change=change,
        was=was,
        now=now,
        start=start,
        size=PAGE,
        total=len(rows),
        sides=[
            ("before", earlier.number, int((found.before[rows] >= 0).sum())),
            ("after", shown.number, int((found.after[rows] >= 0).sum())),
        ],
        export_href=lambda side: (
            lambda format_: _address(
                site, "/diff/export", shown.number, earlier.number, change, was, now, side=side, format=format_
            )
        ),
        images=_images(site, (before, after), (earlier.number, shown.number), found, rows[start : start + PAGE]),
        why=responsible(told, deciders, {**made[0], **made[1]}) if deciders else [],
    )


@router.get("/diff/export")
def exported(
    request: Request,
    site: TheSite,
    run: Annotated[int, Query(ge=1)],
    with_: Annotated[int, Query(alias="with", ge=1)],
    side: Literal["before", "after"],
    change: str = "",
    was: str = "",
    now: str = "",
    format_: Format = "ids",
) -> Response:
    """The images of one part of the comparison as a file, as one of the runs has them."""
    before, after = data_of(request, with_), data_of(request, run)
    found = _difference(request, before, after)
    entries = found.which(change, [was] if was else (), [now] if now else ())
    data, numbers = (before, found.before) if side == "before" else (after, found.after)
    link = _address(site, "/diff", run, with_, change, was, now)
    return download(data, np.sort(numbers[entries][numbers[entries] >= 0]), format_, link)


def _address(site: Site, path: str, run: int, with_: int, change: str, was: str, now: str, **more: str) -> str:
    asked = {"run": run, "with": with_, "change": change, "was": was, "now": now, **more}
    return address(site, path, **{name: value for name, value in asked.items() if value})


def _before(shown: Run | None, runs: list[Run]) -> int | None:
    """The run that this one is compared with if its address names none."""
    if shown is None:
        return None
    there = [one.number for one in runs]
    if shown.before in there:
        return shown.before
    return next((number for number in there if number != shown.number), None)


def _difference(request: Request, before: Data, after: Data) -> Difference:
    """The difference, kept for the next page of the gallery."""
    key = before.inspected.artifact.fingerprint, after.inspected.artifact.fingerprint
    kept: dict[tuple[str, str], Difference] = request.app.state.differences
    with request.app.state.comparing:  # a second request for the same waits for the first
        found = kept.get(key)
        if found is None:
            found = difference(before, after)
            while len(kept) >= 2:
                kept.pop(next(iter(kept)))
            kept[key] = found
    return found


def _ordered(outcomes: tuple[str, ...]) -> list[str]:
    """What a run chose first, what it does not know last."""
    return sorted(outcomes, key=lambda one: (one == ABSENT, one not in RESULT, one))


def _images(
    site: Site, data: tuple[Data, Data], numbers: tuple[int, int], found: Difference, rows: np.ndarray
) -> list[Thumb]:
    """Thumbnails of these entries, as the later run has them, with what changed."""
    before = _read(data[0], found.before[rows])
    after = _read(data[1], found.after[rows])
    images = []
    for row in rows.tolist():
        old, new = before.get(int(found.before[row])), after.get(int(found.after[row]))
        image, number = (new, numbers[1]) if new is not None else (old, numbers[0])
        assert image is not None
        images.append(
            thumb_of(
                site,
                image,
                run=number,
                outcome="" if old is not None and new is not None and old["outcome"] == new["outcome"] else None,
                caption=_told(old, new, moved=bool(found.moved[row]), reclustered=bool(found.reclustered[row])),
                mark="" if new is None or new["outcome"] not in RESULT else "keeper",
            )
        )
    return images


def _read(data: Data, rows: np.ndarray) -> dict[int, dict[str, Any]]:
    wanted = sorted({int(row) for row in rows if row >= 0})
    if not wanted:
        return {}
    marks = ", ".join("?" * len(wanted))
    return {
        row["row"]: row
        for row in data.rows(f"SELECT {', '.join(_SHOWN)} FROM inspected WHERE row IN ({marks})", wanted)
    }


def _told(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, *, moved: bool, reclustered: bool) -> str:
    """What changed, in a line."""
    if old is None:
        return "was not there"
    if new is None:
        return f"was {_words(old['outcome'])}, is not there"
    parts = []
    if old["outcome"] != new["outcome"]:
        parts.append(f"was {_words(old['outcome'])}")
    if old["group_size"] != new["group_size"]:
        parts.append(f"group of {old['group_size'] or 1} → {new['group_size'] or 1}")
    if reclustered:
        parts.append(f"cluster {old['cluster']} → {new['cluster']}")
    if moved:
        parts.append(f"{old['shard']} → {new['shard']}")
    return ", ".join(parts)


def _words(outcome: str) -> str:
    return outcome.replace("_", " ")
