"""The commands that look into a store: show its tables, and check whether it is complete and undamaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lodeset.infra import api
from lodeset.infra.cli.options import Json, Set, err, out, print_json, safe
from lodeset.infra.cli.tables import print_whole
from lodeset.infra.project import Project
from lodeset.pipeline.errors import ConfigError, LodesetError

store_commands = typer.Typer()
DAMAGE_SHOWN = 20

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="configuration file (`lodeset init` writes one)")]
RunNumber = Annotated[int | None, typer.Option("--run", min=1, metavar="N", help="show run N instead of the last one")]


@store_commands.command()
def table(
    config: ConfigPath,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="e.g. rejects [default: list the tables]")] = None,
    of: Annotated[str | None, typer.Option(metavar="STAGE", help="only of this stage or set, e.g. ingest/pool")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="only rows with this value; may be repeated")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="rows shown")] = 20,
    to: Annotated[
        Path | None, typer.Option("--out", help="write all rows to this .parquet, .csv or .jsonl file")
    ] = None,
    number: RunNumber = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """List the tables of the last finished run, or show the rows of one."""
    opened = api.open_store(config, tuple(set_ or ()))
    if name is None:
        _list_tables(api.tables(opened, number), as_json)
        return
    result = api.table(opened, name, of=of, where=_conditions(where or ()), rows=rows, to=to, run=number)
    if isinstance(result, int):
        if as_json:
            print_json({"path": str(to), "rows": result})
        elif result:
            out.print(f"wrote {result:,} rows to {safe(to)}", highlight=False, soft_wrap=True)
        else:
            err.print("no such row: nothing was written", highlight=False)
    elif as_json:
        print_json({"rows": result})
    elif result:
        drawn = Table(*result[0], box=None, pad_edge=False)
        for row in result:
            drawn.add_row(*("" if value is None else safe(value) for value in row.values()))
        print_whole(out, drawn)
    else:
        out.print("no such row")


def _conditions(where: Sequence[str]) -> dict[str, str]:
    for condition in where:
        if "=" not in condition:
            raise ConfigError(f"--where {condition}: give COLUMN=VALUE, e.g. reason=corrupt")
    return {condition.partition("=")[0]: condition.partition("=")[2] for condition in where}


def _list_tables(tables: Sequence[api.Listed], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "tables": [
                    {"stage": t.stage, "table": t.table, "rows": t.rows, "columns": list(t.columns)} for t in tables
                ]
            }
        )
        return
    drawn = Table("stage", "table", "rows", "columns", box=None, pad_edge=False)
    for table in tables:
        drawn.add_row(table.stage, table.table, f"{table.rows:,}", ", ".join(table.columns))
    print_whole(out, drawn)


@store_commands.command()
def verify(
    config: ConfigPath,
    deep: Annotated[bool, typer.Option("--deep", help="read every file and compare its digest")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Look for missing and damaged files in the store; `run` makes them again."""
    done = api.verify(config, deep, tuple(set_ or ()))
    if as_json:
        print_json({**vars(done), "damage": [vars(damage) for damage in done.damage]})
    else:
        how = "all read" if deep else "sizes compared; `--deep` reads them all"
        out.print(
            f"{done.manifests:,} manifests, {done.files:,} files, {done.size_bytes / 1e6:,.1f} MB ({how}): "
            f"{len(done.damage):,} damaged",
            highlight=False,
            soft_wrap=True,
        )
        for damage in done.damage[:DAMAGE_SHOWN]:
            out.print(f"  {safe(damage.path)}: {safe(damage.why)}", highlight=False, soft_wrap=True)
        if len(done.damage) > DAMAGE_SHOWN:
            out.print(f"  and {len(done.damage) - DAMAGE_SHOWN:,} more (`--json` lists all)", highlight=False)
    if done.damage:
        files = "file of the store is" if len(done.damage) == 1 else "files of the store are"
        again = f" (of {', '.join(done.affected)})" if done.affected else ""
        raise LodesetError(
            f"{len(done.damage):,} {files} missing or damaged{again}: `lodeset run {config}` makes again what the "
            "configuration still requires, and removes the rest"
        )


@store_commands.command()
def gc(
    config: ConfigPath,
    keep: Annotated[
        int, typer.Option(min=1, metavar="N", help="keep the last N runs of each data set in the store")
    ] = 10,
    older_than: Annotated[
        float, typer.Option(min=0, metavar="DAYS", help="delete what no run has on record once it is older than this")
    ] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show what would be deleted, and why")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Delete what no kept run needs, and account for every byte of the store."""
    from lodeset.infra.upkeep.gc import GOING, KINDS

    done = Project(config, tuple(set_ or ())).gc(keep=keep, older_than_days=older_than, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "deleted": done.deleted,
                "kept_runs": done.kept_runs,
                "dropped_runs": done.dropped_runs,
                "kinds": [
                    {"kind": kind, "goes": kind in GOING, "files": files, "size_bytes": size, "why": KINDS[kind]}
                    for kind, (files, size) in done.sums.items()
                ],
                "files": [vars(entry) for entry in done.entries],
                "uploads": done.uploads,
            }
        )
        return
    drawn = Table("", "files", "bytes", "", box=None, pad_edge=False)
    drawn.columns[1].justify = drawn.columns[2].justify = "right"
    for kind, (files, size) in done.sums.items():
        if files:
            goes = "deleted" if done.deleted else "would be deleted"
            style = "bold" if kind in GOING else "dim"
            drawn.add_row(goes if kind in GOING else "stays", f"{files:,}", f"{size:,}", KINDS[kind], style=style)
    print_whole(out, drawn)
    out.print(
        f"{'deleted' if done.deleted else 'would delete'} {done.files:,} files, {done.size_bytes:,} bytes; "
        f"keeps {_number_of(done.kept_runs)}, drops {_number_of(done.dropped_runs)}",
        highlight=False,
        soft_wrap=True,
    )
    if done.uploads:
        ended = "aborted" if done.deleted else "would abort"
        out.print(
            f"{ended} {len(done.uploads):,} uploads that were never finished, e.g. of {safe(done.uploads[0])}",
            highlight=False,
        )


def _number_of(runs: Sequence[int]) -> str:
    if not runs:
        return "no run"
    return f"run {runs[0]}" if len(runs) == 1 else f"{len(runs):,} runs ({runs[0]} to {runs[-1]})"


@store_commands.command()
def metrics(
    config: ConfigPath,
    board: Annotated[
        bool, typer.Option("--grafana", help="print a Grafana board of the metrics instead, as JSON to import")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Print the state and the totals of a data set as Prometheus metrics, from its store."""
    from lodeset.infra.observing import grafana

    if board:
        print_json(grafana.board())
        return
    text = Project(config, tuple(set_ or ())).metrics()
    if as_json:
        print_json({"text": text})
    else:
        print(text, end="")
