"""The command that describes the shards of a run for those who read them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lodeset.infra import api
from lodeset.infra.cli.options import Json, Set, out, print_json, safe
from lodeset.infra.cli.store import ConfigPath

card_commands = typer.Typer()


@card_commands.command()
def card(
    config: ConfigPath,
    number: Annotated[
        int | None, typer.Option("--run", min=1, metavar="N", help="of run N instead of the last one")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="write for a copy of the shards in this folder")
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Write a Hugging Face dataset card and a Croissant file of a run's shards."""
    done = api.card(api.open_store(config, tuple(set_ or ())), to, number)
    if as_json:
        print_json({"run": done.run, "readme": done.readme, "croissant": done.croissant, "shards": list(done.shards)})
        return
    for path in (done.readme, done.croissant):
        out.print(f"wrote {safe(path)}", highlight=False, soft_wrap=True)
    if to is not None:
        out.print(
            f"they describe {', '.join(map(safe, done.shards))} of the store: copy these to the same places below {safe(to)}",
            highlight=False,
            soft_wrap=True,
        )
