"""The commands that look into a store: what its tables hold, and whether it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lodeset.infra import api
from lodeset.infra.cli.options import Json, Set, err, out, print_json, safe
from lodeset.infra.cli.tables import print_whole
from lodeset.pipeline.errors import ConfigError, LodesetError

store_commands = typer.Typer()
DAMAGE_SHOWN = 20

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a lodeset.yaml (`lodeset init` writes one)")]
RunNumber = Annotated[int | None, typer.Option("--run", min=1, metavar="N", help="that run instead of the last one")]


@store_commands.command()
def table(
    config: ConfigPath,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="e.g. rejects; without: which there are")] = None,
    of: Annotated[
        str | None, typer.Option(metavar="STAGE", help="of this stage or set alone, e.g. ingest/pool")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="rows that say so; repeatable")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="rows shown")] = 20,
    to: Annotated[Path | None, typer.Option("--out", help="write all rows: .parquet, .csv or .jsonl")] = None,
    number: RunNumber = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Show the tables of the last finished run, or the rows of one."""
    opened = api.open_store(config, tuple(set_ or ()))
    if name is None:
        _list_tables(api.tables(opened, number), as_json)
        return
    found = api.table(opened, name, of=of, where=_conditions(where or ()), rows=rows, to=to, run=number)
    if isinstance(found, int):
        if as_json:
            print_json({"path": str(to), "rows": found})
        elif found:
            out.print(f"wrote {found:,} rows to {safe(to)}", highlight=False, soft_wrap=True)
        else:
            err.print("no such row: nothing was written", highlight=False)
    elif as_json:
        print_json({"rows": found})
    elif found:
        drawn = Table(*found[0], box=None, pad_edge=False)
        for row in found:
            drawn.add_row(*("" if value is None else safe(value) for value in row.values()))
        print_whole(out, drawn)
    else:
        out.print("no such row")


def _conditions(where: Sequence[str]) -> dict[str, str]:
    for one in where:
        if "=" not in one:
            raise ConfigError(f"--where {one}: give COLUMN=VALUE, e.g. reason=corrupt")
    return {one.partition("=")[0]: one.partition("=")[2] for one in where}


def _list_tables(found: Sequence[api.Listed], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "tables": [
                    {"stage": t.stage, "table": t.table, "rows": t.rows, "columns": list(t.columns)} for t in found
                ]
            }
        )
        return
    drawn = Table("stage", "table", "rows", "columns", box=None, pad_edge=False)
    for one in found:
        drawn.add_row(one.stage, one.table, f"{one.rows:,}", ", ".join(one.columns))
    print_whole(out, drawn)


@store_commands.command()
def verify(
    config: ConfigPath,
    deep: Annotated[bool, typer.Option("--deep", help="read every file and compare its digest")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Look for what is missing or damaged in the store; `run` makes it again."""
    done = api.verify(config, deep, tuple(set_ or ()))
    if as_json:
        print_json({**vars(done), "damage": [vars(one) for one in done.damage]})
    else:
        how = "all read" if deep else "sizes compared; `--deep` reads them all"
        out.print(
            f"{done.manifests:,} manifests, {done.files:,} files, {done.size_bytes / 1e6:,.1f} MB ({how}): "
            f"{len(done.damage):,} damaged",
            highlight=False,
            soft_wrap=True,
        )
        for one in done.damage[:DAMAGE_SHOWN]:
            out.print(f"  {safe(one.path)}: {safe(one.why)}", highlight=False, soft_wrap=True)
        if len(done.damage) > DAMAGE_SHOWN:
            out.print(f"  and {len(done.damage) - DAMAGE_SHOWN:,} more (`--json` lists all)", highlight=False)
    if done.damage:
        files = "file of the store is" if len(done.damage) == 1 else "files of the store are"
        again = f" (of {', '.join(done.affected)})" if done.affected else ""
        raise LodesetError(
            f"{len(done.damage):,} {files} missing or damaged{again}: `lodeset run {config}` makes again what the "
            "configuration still asks for, and takes the rest out"
        )
