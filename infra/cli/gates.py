"""The commands about which run counts: gates, accept, rollback."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lodeset.infra import api
from lodeset.infra.cli.options import Json, Set, err, out, print_json, safe
from lodeset.infra.cli.tables import print_whole
from lodeset.pipeline.errors import LodesetError

if TYPE_CHECKING:
    from rich.console import Console

    from lodeset.infra.gates.outcome import Outcome

gates_commands = typer.Typer()

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="configuration file (`lodeset init` writes one)")]
RunNumber = Annotated[int | None, typer.Option("--run", min=1, metavar="N", help="this run instead of the last one")]
Limit = Annotated[int | None, typer.Option(min=1, help="of the runs with this --limit")]
By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="who does it [default: the user of the system]")]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="the reason, for the record")]
STYLES = {"ok": "green", "warn": "yellow", "error": "red", "not compared": "dim", "not reached": "dim"}


@gates_commands.command()
def gates(
    config: ConfigPath,
    number: RunNumber = None,
    to_markdown: Annotated[Path | None, typer.Option("--markdown", help="write the results to this file")] = None,
    to_junit: Annotated[Path | None, typer.Option("--junit", help="write the results as JUnit XML")] = None,
    set_: Set = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Compare the last finished run with the gates of the configuration; exit status 3 if one was breached."""
    from lodeset.infra.gates.shown import junit, markdown

    opened = api.open_store(config, tuple(set_ or ()), limit)
    outcome = api.gates(opened, number)
    if to_markdown is not None:
        _write(to_markdown, _naming(markdown(outcome), config).encode())
    if to_junit is not None:
        _write(to_junit, junit(outcome))
    if as_json:
        print_json(outcome.to_json())
    else:
        show_gates(out, outcome, config)
    if outcome.status == "error":
        raise typer.Exit(3)


def show_gates(console: Console, outcome: Outcome, config: Path) -> None:
    """A row a gate, and a line about all."""
    table = Table("gate", "status", "measure", "found", box=None, pad_edge=False)
    for one in outcome.results:
        told = one.told if one.images is None else f"{one.told}; {one.images:,} images"
        style = STYLES[one.status]
        table.add_row(safe(one.gate), f"[{style}]{one.status}[/]", safe(one.about), safe(_naming(told, config)))
    print_whole(console, table)
    console.print(f"gates: {outcome.said}", soft_wrap=True)
    if outcome.breaches is not None:
        line = f"`lodeset table {safe(config)} breaches --run {outcome.run}` lists the images behind what was breached"
        console.print(line, soft_wrap=True)


def _naming(text: str, config: Path) -> str:
    """Commands with the configuration that the user named."""
    return re.sub(r"(`lodeset \w+) CONFIG\b", lambda found: f"{found[1]} {config}", text)


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise LodesetError(f"cannot write {path}: {error.strerror or error}") from error


@gates_commands.command()
def accept(
    config: ConfigPath,
    number: RunNumber = None,
    by: By = None,
    why: Why = "",
    set_: Set = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Mark a run as the one that gates compare with (`of accepted`)."""
    event = api.accept(api.open_store(config, tuple(set_ or ()), limit), number, by, why)
    if as_json:
        print_json(event.to_json())
    else:
        out.print(f"run {event.run} is accepted: gates compare with it from now on", soft_wrap=True)


@gates_commands.command()
def rollback(
    config: ConfigPath,
    number: Annotated[int, typer.Argument(metavar="RUN", min=1, help="the run that is to count again")],
    by: By = None,
    why: Why = "",
    set_: Set = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Make the shards of an earlier run those that count; the runs after it do not count anymore. Deletes nothing."""
    from lodeset.infra.looking.summary import numbered

    done = api.rollback(api.open_store(config, tuple(set_ or ()), limit), number, by, why)
    back = done.rolled_back
    assert back is not None, "the record of a rollback says so"
    if as_json:
        told = {"run": done.number, "to": back.to, "runs": list(back.runs), "at": back.at}
        print_json({**told, "by": back.by, "why": back.why})
        return
    out.print(
        f"what run {back.to} made counts again, and what {numbered(back.runs)} made does not (recorded as run {done.number})",
        soft_wrap=True,
    )
    err.print(
        f"the next run continues from run {back.to}. It is refused as long as nothing that shards are made from has changed "
        f"since run {max(back.runs)}: `lodeset plan {safe(config)}` tells",
        soft_wrap=True,
    )
