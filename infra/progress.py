"""What a person sees while a run goes on: a bar a stage with images/s and time left, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline.dag.background import repeating
from pipeline.dag.runner import Event
from training.lines import last_line


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        count, started = task.fields["count"], task.fields["started"]
        seconds = time.monotonic() - started
        return Text(f"{count / seconds:,.0f} {task.fields['unit']}/s" if count and seconds > 1 else "", style="cyan")


@contextmanager
def watching(console: Console) -> Iterator[Callable[[Event], None]]:
    """A callback for the runner. On a terminal it draws bars; elsewhere it writes a line when a stage starts or ends."""
    if not console.is_terminal:
        yield lambda event: _line(console, event)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", justify="left"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True) as bars:

        def watch(event: Event) -> None:
            id_ = event.stage.id
            if event.kind == "started":
                tasks[id_] = bars.add_task(id_, total=1.0, count=0, unit="images", started=time.monotonic())
            elif event.kind == "progress" and event.progress is not None and id_ in tasks:
                bars.update(
                    tasks[id_], completed=event.progress.fraction, count=event.progress.count, unit=event.progress.unit
                )
            else:
                if id_ in tasks:
                    bars.remove_task(tasks.pop(id_))
                _line(bars.console, event)

        yield watch


@contextmanager
def following(console: Console, folder: Path) -> Iterator[None]:
    """Says while the block runs which step the runs in `folder` have come to; nothing where nobody looks."""
    if not console.is_terminal:
        yield
        return
    with console.status("reading the shards") as status:

        def look() -> float:
            for path in sorted(folder.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)[-1:]:
                line = last_line(path)
                if line is not None:
                    rate = f"{line['images_per_s']:,.0f} images/s"
                    status.update(f"{path.parent.name}: step {line['step']:,}, loss {line['loss']:.3f}, {rate}")
            return 2.0

        with repeating(look, 2.0):
            yield


def _line(console: Console, event: Event) -> None:
    id_ = event.stage.id
    if event.kind == "started":
        console.print(f"[dim]start[/]  {id_:<24} [dim]{escape(event.reason)}[/]", highlight=False)
    elif event.kind == "done" and event.artifact is not None:
        console.print(f"[green]done[/]   {id_:<24} {told(event)}", highlight=False)
    elif event.kind == "taken over":
        console.print(f"[cyan]kept[/]   {id_:<24} [dim]{escape(event.reason)}[/]", highlight=False)
    elif event.kind == "failed":
        console.print(f"[red]failed[/] {id_}", highlight=False)
    elif event.kind == "damaged":
        console.print(f"[yellow]damaged[/] {id_:<23} [dim]made again: {escape(event.reason)}[/]", highlight=False)


def told(event: Event) -> str:
    """`12,000 -> 11,500 in 8.1 s (near 480, reference 20)`."""
    assert event.artifact is not None
    rows = event.artifact.rows
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in rows.dropped.items())
    return f"{rows.taken:,} -> {rows.kept:,} in {event.artifact.seconds:.1f} s" + (
        f" [dim]({reasons})[/]" if reasons else ""
    )
