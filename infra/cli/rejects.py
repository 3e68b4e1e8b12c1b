"""The command that lists what ingest refused, has it read again, or accepts it."""

from __future__ import annotations

import getpass
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lodeset.infra import api
from lodeset.infra.cli.options import Json, Set, out, print_json, safe
from lodeset.infra.cli.tables import print_whole
from lodeset.pipeline.errors import ConfigError

if TYPE_CHECKING:
    from lodeset.infra.upkeep.rejects import Reject

reject_commands = typer.Typer()

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="configuration file (`lodeset init` writes one)")]


class Action(StrEnum):
    """What to do about the rejects."""

    list = "list"
    show = "show"
    retry = "retry"
    accept = "accept"


@reject_commands.command()
def rejects(
    config: ConfigPath,
    action: Annotated[
        Action,
        typer.Argument(
            help="list: how many by reason; show: each; retry: the next run reads them again; accept: let them be"
        ),
    ] = Action.list,
    reason: Annotated[str | None, typer.Option(metavar="REASON", help="only these, e.g. corrupt")] = None,
    transient: Annotated[
        bool | None,
        typer.Option(
            "--transient/--permanent",
            help="only those that may succeed if read again, or that will not [default: both]",
        ),
    ] = None,
    since_version: Annotated[
        str | None, typer.Option(metavar="VERSION", help="only those that versions of lodeset before this one examined")
    ] = None,
    accepted: Annotated[bool, typer.Option("--accepted", help="accepted ones, too")] = False,
    rows: Annotated[int, typer.Option(min=1, help="rows that `show` shows")] = 20,
    why: Annotated[str, typer.Option(help="accept: a note that is kept with it")] = "",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Show what ingest refused, with its history; have it read again, or accept it."""
    from lodeset.infra.upkeep.rejects import Chosen, by_reason

    opened = api.open_store(config, tuple(set_ or ()))
    chosen = Chosen(reason, transient, since_version, accepted)
    if action is Action.retry:
        done = api.retry_rejects(opened, chosen)
        if as_json:
            print_json(asdict(done))
        elif done.rejects:
            out.print(
                f"{done.rejects:,} rejects in {done.parts:,} slices of {', '.join(done.stages)} are to be read again: "
                f"`lodeset run {safe(config)}`",
                highlight=False,
                soft_wrap=True,
            )
        else:
            out.print("no such reject: nothing is to be read again")
        return
    if action is Action.accept:
        if reason is None and transient is None and since_version is None:
            raise ConfigError("accept: say which, e.g. `--reason corrupt`; nothing is accepted wholesale")
        count = api.accept_rejects(opened, chosen, getpass.getuser(), why)
        if as_json:
            print_json({"accepted": count})
        else:
            out.print(f"accepted {count:,} rejects", highlight=False)
        return
    found = api.rejects(opened, chosen)
    if action is Action.show:
        if as_json:
            print_json({"rejects": [asdict(reject) for reject in found]})
        else:
            _show(found, rows)
        return
    groups = by_reason(found)
    if as_json:
        print_json({"reasons": [_summary(name, group) for name, group in groups]})
        return
    if not groups:
        out.print("no such reject")
        return
    table = Table("reason", box=None, pad_edge=False)
    table.add_column("rejects", justify="right")
    for heading in ("may succeed if read again", "first", "last", "attempts", "examined by"):
        table.add_column(heading)
    for name, group in groups:
        told = _summary(name, group)
        versions = ", ".join(told["versions"]) or "0.1.0 or before"
        attempts = f"up to {told['attempts']}" if told["attempts"] > 1 else "1"
        table.add_row(
            name, f"{told['rejects']:,}", "yes" if told["transient"] else "no", _day(told["first"]), _day(told["last"]), attempts, versions
        )  # fmt: skip
    print_whole(out, table)
    if any(group[0].transient for _, group in groups):
        out.print(
            f"`lodeset rejects {safe(config)} retry --transient` has those that may succeed read again",
            highlight=False,
            soft_wrap=True,
        )


def _summary(name: str, group: list[Reject]) -> dict[str, Any]:
    times = [when for reject in group for when in (reject.first, reject.last) if when is not None]
    return {
        "reason": name,
        "rejects": len(group),
        "transient": group[0].transient,
        "first": min(times, default=None),
        "last": max(times, default=None),
        "attempts": max(reject.attempts for reject in group),
        "versions": sorted({reject.version for reject in group if reject.version}),
    }


def _show(found: list[Reject], rows: int) -> None:
    table = Table(
        "set",
        "place",
        "reason",
        "may succeed if read again",
        "attempts",
        "first",
        "last",
        "version",
        "detail",
        box=None,
        pad_edge=False,
    )
    for reject in found[:rows]:
        place = f"{reject.uri} {reject.member}".strip()
        mark = "accepted" if reject.accepted else "yes" if reject.transient else "no"
        table.add_row(
            safe(reject.set), safe(place), reject.reason, mark, str(reject.attempts), _day(reject.first), _day(reject.last),
            reject.version, safe(reject.detail),
        )  # fmt: skip
    if found:
        print_whole(out, table)
    if len(found) > rows:
        out.print(f"and {len(found) - rows:,} more (`--rows`, or `--json` for all)", highlight=False)
    elif not found:
        out.print("no such reject")


def _day(when: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when)) if isinstance(when, float) else ""
