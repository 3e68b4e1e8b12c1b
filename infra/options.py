"""What the command line's files share: consoles, options, JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="override a key of the configuration; repeatable")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on standard output")]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
