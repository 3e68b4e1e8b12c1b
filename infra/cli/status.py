"""The command that shows a data set: its last finished run, and the run that is at work or was the last to fail."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import humanize
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lodeset.infra.cli.options import Json, Set, err, out, print_json, safe
from lodeset.infra.cli.store import RunNumber
from lodeset.infra.cli.tables import print_whole, show, show_changes, show_retrieval
from lodeset.infra.project import Project, Status
from lodeset.pipeline.errors import ConfigError, LodesetError, Terminated, ends_like_an_interrupt
from lodeset.pipeline.shown import redacted, shown

if TYPE_CHECKING:
    from lodeset.infra.looking.now import Now, StageNow

status_commands = typer.Typer()

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="configuration file (`lodeset init` writes one)")]
LOOK_S = 2.0  # between two looks of `--watch`

GATE = 3
_COLOURS = {
    "running": "green",
    "done": "green",
    "silent": "yellow",
    "stopped": "yellow",
    "killed": "red",
    "failed": "red",
}


@status_commands.command()
def status(
    config: ConfigPath,
    watch: Annotated[bool, typer.Option("--watch", help="follow the run that is at work until it ends")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="print only the state, and exit with 0 (finished and unchanged), 4 (a run is at work), "
            "3 (a gate was breached) or 1 (anything else)",
        ),
    ] = False,
    number: RunNumber = None,
    code: Annotated[bool, typer.Option("--snippet", help="print only Python code that reads the shards")] = False,
    set_: Set = None,
    limit: Annotated[int | None, typer.Option(min=1, help="of the seeded sample of N pool images")] = None,
    as_json: Json = False,
) -> None:
    """Show the last finished run, and whether a run is at work: what each stage took, kept and dropped, what it waits for, and
    the next command."""  # fmt: skip

    from lodeset.infra.looking.summary import snippet

    if sum((watch, check, code, number is not None)) > 1:
        raise ConfigError("--watch, --check, --snippet and --run exclude one another: give one of them")
    project = Project(config, tuple(set_ or ()), limit)
    given = _as_given(config, tuple(set_ or ()), limit)
    if watch:
        raise typer.Exit(_watched(project, given, as_json))
    if check:
        raise typer.Exit(_checked(project, given, as_json))
    found = project.status(number)
    if code:
        if found.summary.shards is None:
            raise LodesetError(f"no finished run of {config} has written shards: `lodeset run` first")
        print(snippet(found.summary), end="")
    else:
        show_status(config, found, as_json, given)


def _checked(project: Project, given: str, as_json: bool) -> int:
    """Print the state of the last attempt, and return its exit code. Only where it is done, sources are listed to say whether they
    have changed since, and the gates of the run are looked at: its news, which said what they found, may have been deleted."""
    now = project.now()
    finished = project.status().summary if now.state == "done" else None
    changed = finished.changed if finished is not None else None
    if as_json:
        print_json({"now": _now_tree(now, given, changed)})
    else:
        print_now(now, given, changed)
    breached = finished is not None and finished.gates is not None and finished.gates.status == "error"
    status_code = now.status_code(changed)
    return GATE if breached and status_code == 0 else status_code


def _as_given(config: Path, overrides: tuple[str, ...], limit: int | None) -> str:
    """The configuration with the options that say which data set is meant, to be pasted into a shell."""
    options = [word for override in overrides for word in ("--set", override)]
    options += [] if limit is None else ["--limit", str(limit)]
    return shlex.join([str(config), *options])


def show_status(config: Path, found: Status, as_json: bool, given: str = "") -> None:
    """Print a finished run; before it, the last attempt unless that is what finished it."""

    from lodeset.infra.looking.summary import lines

    given = given or shlex.quote(str(config))
    changed = found.summary.changed
    entries = found.stages
    if as_json:
        now = _now_tree(found.now, given, changed)
        print_json({"artifacts": list(entries), **found.summary.to_json(), "now": now})
        return
    if found.now.state not in ("done", "never run"):
        print_now(found.now, given, changed)
        out.print()
    table = Table("stage", box=None, pad_edge=False)
    for heading in ("in", "kept", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("dropped")  # last, because it may be long
    for entry in entries:
        id_ = f"{entry['stage']}/{entry['set']}"
        if not entry["finished"]:
            table.add_row(id_, "", "", "", "not finished", style="dim")
            continue
        rows = entry["rows"]
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in rows["dropped"].items())
        table.add_row(id_, f"{rows['in']:,}", f"{rows['kept']:,}", f"{entry['seconds']:.1f}", dropped)
    show(out, table)
    show_retrieval(out, entries)
    show_changes(out, entries)
    for entry in entries:
        for warning in entry["details"].get("warnings", ()):
            err.print(
                f"[yellow]warning:[/] {entry['stage']}/{entry['set']}: {safe(warning)}",
                highlight=False,
                soft_wrap=True,
            )
    for line in lines(found.summary, str(config)):
        out.print(safe(line), highlight=False, soft_wrap=True)


# -- the last attempt


def print_now(now: Now, given: str, changed: bool | None) -> None:
    """Print the state of the last attempt, its stages unless it is done, and the next command."""
    for part in _parts(now, given, changed):
        if isinstance(part, Table):
            print_whole(out, part)
        else:
            out.print(part, highlight=False, soft_wrap=True)


def _parts(now: Now, given: str, changed: bool | None) -> Iterator[RenderableType]:

    began = "" if now.began is None else f"attempt {now.attempt}, begun {_clock(now.began)}"
    heard = "" if now.heard is None or not now.at_work else f"heard {_age(now.heard)} ago"
    where = ", ".join(f"{key} {value}" for key, value in now.owner.items()) if now.at_work else ""
    yield Text.from_markup(
        f"[bold {_COLOURS.get(now.state, 'white')}]{now.state}[/]  {safe(', '.join(p for p in (began, where, heard) if p))}".rstrip()
    )
    if now.state == "done" and changed:
        yield Text("the configuration or its sources have changed since: there is more to do")
    elif now.why and now.state != "done":
        yield Text(shown(now.why))
    if now.stages and now.state != "done":
        yield _stages(now)
    if now.at_work:
        yield Text(
            f"safe to run again: {'yes' if now.safe_to_run else 'no: a second run would be refused (exit code 4)'}"
        )
    yield Text(f"next: {now.next_command(given, changed)}")


def _stages(now: Now) -> Table:
    table = Table("stage", "state", box=None, pad_edge=False)
    for heading in ("done", "parts", "last part", "speed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for stage in now.stages:
        parts = (
            ""
            if stage.parts_done is None
            else f"{stage.parts_done:,}" + (f" of {stage.parts:,}" if stage.parts else "")
        )
        table.add_row(
            stage.id,
            stage.state,
            f"{stage.fraction:.0%}" if stage.state in ("running", "failed", "stopped") and stage.fraction else "",
            parts if stage.state != "finished" else "",
            "" if stage.last_part_age is None or stage.state == "finished" else f"{_age(stage.last_part_age)} ago",
            "" if stage.rate is None else f"{stage.rate:,.0f} {stage.unit}/s",
            safe(_remark(stage)),
            style={"waiting": "dim", "finished": "dim", "failed": "red"}.get(stage.state, ""),
        )
    return table


def _remark(stage: StageNow) -> str:
    if stage.error:
        return f"{stage.error} (log: {stage.log})" if stage.log and stage.log not in stage.error else stage.error
    if stage.waits_for:
        return f"waits for {stage.waits_for}" if not stage.waits_for.startswith("after ") else stage.waits_for
    return stage.phase if stage.state == "running" else ""


def _age(seconds: float) -> str:
    return (
        humanize.precisedelta(round(seconds), minimum_unit="seconds", format="%d")
        if seconds < 120
        else humanize.naturaldelta(seconds)
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _now_tree(now: Now, given: str, changed: bool | None) -> dict[str, Any]:
    return {**now.to_json(), "next": now.next_command(given, changed)}


def _watched(project: Project, given: str, as_json: bool) -> int:
    """Show the state until no run is at work, and return the exit code. To stop watching does not stop the run."""
    live = Live(console=out, refresh_per_second=2, transient=True) if out.is_terminal and not as_json else None
    try:
        with live or contextlib.nullcontext(), ends_like_an_interrupt():
            now = _until_it_ends(project, given, as_json, live)
    except KeyboardInterrupt as stop:
        err.print("no longer watching: the run goes on")
        return 143 if isinstance(stop, Terminated) else 130
    changed = project.status().summary.changed
    if not as_json:
        print_now(now, given, changed)
    return now.status_code(changed)


def _until_it_ends(project: Project, given: str, as_json: bool, live: Live | None) -> Now:
    """Look again and again: on a terminal in place, otherwise a line per change. A run that has been silent for longer than its
    claim lasts is not waited for."""
    before: Any = None
    while True:
        now = project.now()
        if live is not None:
            live.update(Group(*_parts(now, given, None)))
        elif as_json:
            print(json.dumps(redacted(_now_tree(now, given, None))), flush=True)
        elif _essence(now) != before:
            before = _essence(now)
            out.print(_line(now), highlight=False, soft_wrap=True)
        if not now.at_work or now.safe_to_run:
            return now
        time.sleep(LOOK_S)


def _essence(now: Now) -> Any:
    return now.state, now.moving, [(s.id, s.state, s.phase, s.parts_done, int(10 * s.fraction)) for s in now.stages]


def _line(now: Now) -> Text:
    at = [f"{s.id} {s.phase} {s.fraction:.0%}".replace("  ", " ") for s in now.stages if s.state == "running"]
    done = sum(stage.state == "finished" for stage in now.stages)
    return Text(
        f"{_clock(time.time())}  {now.state}, {done} of {len(now.stages)} stages finished: {', '.join(at) or shown(now.why)}"
    )
