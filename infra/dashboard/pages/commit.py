"""What one decided on a page as a change of the configuration: a patch to download, the images that it concerns, and what it costs."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import Response, StreamingResponse

from lodeset.infra import api, dag
from lodeset.infra.config import Config
from lodeset.infra.dashboard import render
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.lines import Change, Line, change, line, whole_change
from lodeset.infra.dashboard.links import Links, TheLinks
from lodeset.infra.dashboard.pages.duplicates import Start, changed_cards
from lodeset.infra.dashboard.patches import PatchError, patch, written
from lodeset.infra.dashboard.rereading import FileNow, reread
from lodeset.infra.project import Plan
from lodeset.infra.session import Opened
from lodeset.pipeline.dag.runs import newest_first
from lodeset.pipeline.dag.stage import closure
from lodeset.pipeline.errors import ConfigError, LodesetError

router = APIRouter()

SIDE = 60  # images of a page of either gallery
JOINS = 3_000  # with more between the two values, only the images nearest to the line are pictured
PLAN_S = 20.0

Made = TypeVar("Made")
Name = Annotated[str, Query(max_length=40)]
Value = Annotated[float, Query(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One page of the images that leave or come back. `total`: None where only the nearest were looked for."""

    cards: list[Any]
    start: int
    found: int
    total: int | None
    before: str | None
    after: str | None


@router.get("/commit")
def commit(
    request: Request,
    links: TheLinks,
    data: TheData,
    setting: Annotated[str | None, Query(max_length=40)] = None,
    value: Annotated[float | None, Query(allow_inf_nan=False)] = None,
    leave: Start = 0,
    back: Start = 0,
    priced: bool = False,
) -> Response:
    """A value of a setting as a patch of the configuration."""
    if setting is None or value is None:
        settings = data.dedup.settings if data.dedup is not None else ()
        return render.page(
            request, "commit.html.jinja", settings=settings, found=None, file=links.site.opened.path.name
        )
    found = _line(data, setting)
    value = found.value(value)
    told = change(data, setting, value, JOINS)
    file = reread(links.site.opened)
    text, problem = _patch(file, setting, value)
    return render.page(
        request,
        "commit.html.jinja",
        found=found,
        value=written(value),
        diff=text.splitlines(),
        problem=problem,
        apply=shlex.join(["patch", str(links.site.opened.path), _file_name(setting, value)]),
        key=f"dedup.{setting}",
        options=options_of(links.site.opened, f"dedup.{setting}={written(value)}" if problem else ""),
        now=found.counts(found.setting.now),
        instead=_value_now(file, setting),
        then=found.counts(value),
        changed=told,
        warnings=warnings_of(links, data, file),
        sides={
            name: _side(links, found, told, name, start, {"leave": leave, "back": back}, value)
            for name, start in (("leave", leave), ("back", back))
        },
        plan=_priced(links.site.opened, file, setting, value) if priced else None,
        file=links.site.opened.path.name,
    )


@router.get("/commit/configuration.patch")
def configuration(links: TheLinks, data: TheData, setting: Name, value: Value) -> Response:
    """The patch as a file."""
    found = _line(data, setting)
    value = found.value(value)
    text, problem = _patch(reread(links.site.opened), setting, value)
    if problem:
        raise HTTPException(409, problem)
    if not text:
        raise HTTPException(404, f"The configuration has dedup.{setting} {written(value)} already.")
    return Response(text, media_type="text/x-diff", headers=attached(_file_name(setting, value)))


@router.get("/commit/{side}.txt")
def ids(data: TheData, side: str, setting: Name, value: Value) -> Response:
    """The image_ids of all images that leave, or that come back, one a line."""
    if side not in ("leave", "back"):
        raise HTTPException(404, "There are leave.txt and back.txt.")
    found = _line(data, setting)
    value = found.value(value)
    column = whole_change(data, setting, value).side(side == "leave")["image_id"]

    def lines() -> Iterator[str]:
        for chunk in column.chunks:
            for start in range(0, len(chunk), 10_000):
                yield "".join(f"{one}\n" for one in chunk[start : start + 10_000].to_pylist())

    name = f"{side}-{setting}-{written(value)}.txt"
    return StreamingResponse(lines(), media_type="text/plain; charset=utf-8", headers=attached(name))


@router.get("/commit/plan")
def plan(request: Request, links: TheLinks, data: TheData, setting: Name, value: Value) -> Response:
    """What the next run would do with the value: a part of the page."""
    found = _line(data, setting)
    opened = links.site.opened
    return render.page(request, "plan.html.jinja", plan=_priced(opened, reread(opened), setting, found.value(value)))


def _line(data: Data, setting: str) -> Line:
    found = line(data, setting)
    if found is None:
        raise LodesetError("this run has not looked for near-duplicates: no setting of dedup can be tried")
    return found


def _file_name(setting: str, value: float) -> str:
    return f"{setting}-{written(value)}.patch"


def attached(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def options_of(opened: Opened, override: str) -> list[str]:
    """What `plan` and `run` need besides the configuration."""
    limit = opened.config.ingest.limit
    return [
        *(("--set", override) if override else ()),
        *(("--limit", str(limit)) if limit and opened.overridden else ()),
    ]


def _value_now(file: FileNow, setting: str) -> float | None:
    """What the next run would take without the change; None where that is not known."""
    value = getattr(file.config.dedup, setting, None) if file.config is not None else None
    return float(value) if isinstance(value, int | float) else None


def _patch(file: FileNow, setting: str, value: float) -> tuple[str, str]:
    """The patch, and why there is none."""
    if file.text is None:
        return "", file.problem
    try:
        return patch(file.text, file.name, ("dedup", setting), value), ""
    except PatchError as error:
        return "", str(error)
    except ConfigError as error:
        return "", f"{file.name} is no valid configuration now: {error}"


def warnings_of(links: Links, data: Data, file: FileNow) -> list[str]:
    """Why the next run may change more than the page says."""
    opened, held = links.site.opened, data.inspected.held
    found = []
    if file.problem:
        found.append(f"{file.problem}. The next run cannot start before that is mended.")
    elif file.differs_from_run(data):
        found.append(
            f"{file.name} differs now from the configuration that this run was made with, so the next run will change more than "
            "this page shows."
        )
    elif held.changed:
        found.append("The sources have changed since this run, so the next run will change more than this page shows.")
    newest = next(newest_first(opened.store, opened.config.name), None)
    if held.run is not None and newest is not None and newest.number != held.run.number:
        found.append(
            f"This is run {held.run.number}, and run {newest.number} is the last one: the next run goes on from that one."
        )
    if opened.overridden:
        found.append("This dashboard was started with --set or --limit. Give the commands below the same.")
    return found


def _side(links: Links, found: Line, told: Change, name: str, start: int, starts: dict[str, int], value: float) -> Side:
    table = told.side(name == "leave")

    def page(at: int) -> str:
        return (
            links.to("/commit", setting=found.setting.name, value=written(value), **{**starts, name: at}) + f"#{name}"
        )

    return Side(
        cards=changed_cards(links, found, table.slice(start, SIDE)),
        start=start,
        found=table.num_rows,
        total=table.num_rows if told.whole else None,
        before=page(max(0, start - SIDE)) if start else None,
        after=page(start + SIDE) if start + SIDE < table.num_rows else None,
    )


# -- what it costs


@dataclass(frozen=True)
class Priced:
    """What the next run would do, or why that cannot be told."""

    plan: Plan | None
    problem: str = ""


def _priced(opened: Opened, file: FileNow, setting: str, value: float) -> Priced:
    if file.config is None:
        return unpriced(file)
    dedup = file.config.dedup.model_copy(update={setting: value})
    return priced(opened, file.config.model_copy(update={"dedup": dedup}))


def unpriced(file: FileNow) -> Priced:
    return Priced(None, f"The next run cannot be planned here: {file.problem}")


def priced(opened: Opened, config: Config) -> Priced:
    """What the next run would do with another configuration."""

    def plan() -> Plan:
        stages = closure(dag.build(config), None)
        return Plan.of(api.plan(replace(opened, config=config, stages=stages, missing=(), ids=tuple(stages))))

    try:
        return Priced(within(PLAN_S, plan))
    except TimeoutError:
        return Priced(None, f"Planning took longer than {PLAN_S:g} s. The command below does it without a limit.")
    except LodesetError as error:
        return Priced(None, f"The next run cannot be planned here: {error}")


_AT_WORK = threading.Semaphore(2)


def within(seconds: float, work: Callable[[], Made]) -> Made:
    """What `work` returns in a thread of its own.

    Raises:
        TimeoutError: it takes longer, or others before it do; its thread ends by itself.
    """
    if not _AT_WORK.acquire(timeout=seconds):
        raise TimeoutError
    done: Future[Made] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)
        finally:
            _AT_WORK.release()

    threading.Thread(target=run, daemon=True).start()
    return done.result(timeout=seconds)
