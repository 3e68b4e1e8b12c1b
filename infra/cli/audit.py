"""The command that keeps what people judged of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lodeset.infra import api
from lodeset.infra.cli.options import Json, Set, out, print_json, safe
from lodeset.infra.cli.store import ConfigPath
from lodeset.infra.cli.tables import print_whole

audit_commands = typer.Typer()


@audit_commands.command()
def audit(
    config: ConfigPath,
    verdicts: Annotated[Path, typer.Argument(metavar="VERDICTS", help="file that the page Audit offered to download")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Keep verdicts of the dashboard beside the run that they are about; the report shows them."""
    done = api.audit(api.open_store(config, tuple(set_ or ())), verdicts)
    samples = [(one, one.estimate) for one in done.audit.samples]
    if as_json:
        told = [
            {
                "of": one.of,
                "count": one.count,
                "right": found.right,
                "wrong": found.wrong,
                "unsure": found.unsure,
                "error_rate": found.rate,
                "low": found.low,
                "high": found.high,
            }
            for one, found in samples
        ]
        print_json({"run": done.audit.run, "path": done.path, "new": done.new, "samples": told})
        return
    table = Table("decision", box=None, pad_edge=False)
    for heading in ("how often", "right", "wrong", "unsure", "wrong, 95 % sure"):
        table.add_column(heading, justify="right")
    for one, found in samples:
        between = f"{found.low:.1%} to {found.high:.1%}" if found.rate is not None else ""
        table.add_row(
            safe(one.of), f"{one.count:,}", f"{found.right:,}", f"{found.wrong:,}", f"{found.unsure:,}", between
        )
    print_whole(out, table)
    state = "kept as" if done.new else "was kept before as"
    out.print(f"{state} {safe(done.path)}; `lodeset report {safe(config)}` shows it", highlight=False, soft_wrap=True)
