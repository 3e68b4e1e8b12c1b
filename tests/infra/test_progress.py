"""What is told of a run on standard error."""

import io

import pytest
from rich.console import Console
from toy_stages import count

from infra.progress import watching
from pipeline.dag.runner import Event
from pipeline.dag.stage import Stage

STAGE = Stage("dedup", "pool", 1, "ray", count, {})


@pytest.mark.parametrize(("kind", "terminal"), [("started", False), ("taken over", False), ("taken over", True)])
@pytest.mark.parametrize("reason", ['files.0 "a[/b].tar" -> "c.tar"', 'label "[red]" -> "[bold]"'])
def test_reasons_are_shown_as_they_are(kind: str, terminal: bool, reason: str) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, no_color=True)
    with watching(console) as watch:
        watch(Event(kind, STAGE, reason=reason))  # type: ignore[arg-type]  # a parameter
    assert reason in out.getvalue()
