"""Shared by the modules of the command line: consoles, options, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from lodeset.pipeline.shown import redacted, shown

WIDE = 10_000  # columns of a file or a pipe, so that nothing is wrapped there


class Screen(Console):
    """A console that makes text from outside safe: every text passes through `shown`, which removes secrets and active
    characters.
    """

    def __init__(self, **options: Any) -> None:
        # A file called `:bomb:.jpg` is shown under that name.
        super().__init__(emoji=False, highlight=False, **options)
        if not self.is_terminal:
            self.width = WIDE

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(shown(segment.text, lines=True), segment.style)


out = Screen()
err = Screen(stderr=True)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="override a key of the configuration; may be repeated"),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on standard output")]


def safe(value: object) -> str:
    """Text from outside as markup, on one line."""
    return escape(shown(value))


def print_json(value: Any) -> None:
    """Print JSON with everything except ASCII escaped, so that nothing in it acts on a terminal."""
    print(json.dumps(redacted(value), indent=1))
