"""Show the progress of a run on standard error: bars on a terminal, otherwise a line every half minute."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from lodeset.infra.cli.options import safe
from lodeset.pipeline.dag.background import repeating
from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.dag.stage import Progress
from lodeset.pipeline.shown import redacted

EVERY_S = 30.0  # between two lines if there is no terminal
QUIET_S = 30.0  # time without news after which that is reported


@dataclass
class Work:
    """The progress of a stage in the form that is displayed: it never goes back, and it ends with "finishing" instead
    of 100 %.
    """

    begun: float  # of the phase
    heard: float  # time of the last change
    phase: str = ""
    round: int = 1
    first: float | None = None  # fraction at the beginning of the phase: what earlier runs had done
    fraction: float = 0.0
    count: int = 0
    unit: str = "images"

    def hear(self, progress: Progress, now: float) -> None:
        again = progress.phase == self.phase and self.finishing and progress.fraction < 1
        if again or progress.phase != self.phase:
            self.round = self.round + 1 if again else 1
            self.begun, self.phase, self.first, self.fraction, self.count = (
                now,
                progress.phase,
                progress.fraction,
                0.0,
                0,
            )
            self.heard = now
        if (progress.fraction, progress.count) > (self.fraction, self.count):
            self.heard = now
        if self.first is None:
            self.first = progress.fraction
        # A training that continues from its last checkpoint repeats some steps.
        self.fraction = max(self.fraction, progress.fraction)
        self.count, self.unit = max(self.count, progress.count), progress.unit

    @property
    def finishing(self) -> bool:
        return self.fraction >= 1

    @property
    def name(self) -> str:
        named = self.phase + (f", round {self.round}" if self.round > 1 else "")
        return f"{named}: finishing" if named and self.finishing else "finishing" if self.finishing else named

    def rate(self, now: float) -> str:
        seconds = now - self.begun
        return f"{self.count / seconds:,.0f} {self.unit}/s" if self.count >= seconds > 1 else ""

    def left(self, now: float) -> str:
        """Time left, or for how long there has been no news."""
        if now - self.heard >= QUIET_S:
            return f"no news for {_duration(now - self.heard)}"
        if self.finishing or self.first is None or self.fraction <= self.first or now - self.begun < 2:
            return ""
        seconds = (now - self.begun) * (1 - self.fraction) / (self.fraction - self.first)
        return f"{_duration(seconds)} left"

    def line(self, now: float) -> str:
        share = "" if self.finishing or not self.fraction else f"{self.fraction:.0%}"
        return ", ".join(piece for piece in (self.name, share, self.rate(now), self.left(now)) if piece) or "working"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3600:.1f} h"


class _Percent(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.percentage:>3.0f} %")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["work"].rate(time.monotonic()), style="cyan")


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        text = task.fields["work"].left(time.monotonic())
        return Text(text, style="yellow" if text.startswith("no news") else "")


@contextmanager
def watching(console: Console) -> Iterator[Callable[[Event], None]]:
    """A callback for the runner. On a terminal, and in a notebook with ipywidgets, it draws bars; otherwise it prints a
    line when a stage starts or ends, and one every half minute for each running stage.
    """
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    with _bars(console) if console.is_terminal or widgets else _lines(console) as watch:
        yield watch


@contextmanager
def json_lines(name: str) -> Iterator[Callable[[Event], None]]:
    """A callback that writes every event as one line of JSON on standard error, for log collectors."""
    where = {"run": name, "host": socket.gethostname(), "pid": os.getpid()}

    def watch(event: Event) -> None:
        told: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": _LEVELS.get(event.kind, "info"),
            "event": event.kind,
            **where,
            "stage": event.stage.name,
            "set": event.stage.set,
        }
        if event.progress is not None:
            told |= asdict(event.progress)
        if event.artifact is not None:
            rows = event.artifact.rows
            told |= {
                "in": rows.taken,
                "kept": rows.kept,
                "dropped": dict(rows.dropped),
                "seconds": event.artifact.seconds,
            }
        told |= {key: value for key, value in (("reason", event.reason), ("log", event.log)) if value}
        print(json.dumps(redacted(told)), file=sys.stderr, flush=True)

    yield watch


_LEVELS = {"failed": "error", "again": "warning", "damaged": "warning", "progress": "debug", "waiting": "debug"}


@contextmanager
def _lines(console: Console) -> Iterator[Callable[[Event], None]]:
    at_work: dict[str, Work] = {}
    lock = threading.Lock()

    def watch(event: Event) -> None:
        id_, now = event.stage.id, time.monotonic()
        with lock:
            if event.kind == "started":
                at_work[id_] = Work(now, now)
            elif event.kind == "progress":
                if event.progress is not None and id_ in at_work:
                    at_work[id_].hear(event.progress, now)
            else:
                at_work.pop(id_, None)
            _line(console, event)

    def look() -> float:
        now = time.monotonic()
        with lock:
            for id_, work in at_work.items():
                if not work.fraction and now - work.begun < EVERY_S / 3:
                    continue  # its start has just been reported
                console.print(f"[dim]still[/]  {id_:<24} {safe(work.line(now))}", highlight=False, soft_wrap=True)
        return EVERY_S

    with repeating(look, EVERY_S):
        yield watch


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[Event], None]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", justify="left", markup=False),
        BarColumn(bar_width=24),
        _Percent(),
        _Rate(),
        TimeElapsedColumn(),
        _Left(),
    )
    tasks: dict[str, TaskID] = {}
    at_work: dict[str, Work] = {}
    with Bars(*columns, console=console, transient=True) as bars:

        def watch(event: Event) -> None:
            id_, now = event.stage.id, time.monotonic()
            if event.kind == "started":
                at_work[id_] = work = Work(now, now)
                tasks[id_] = bars.add_task(id_, total=1.0, work=work)
            elif event.kind == "progress" and event.progress is not None and id_ in tasks:
                work = at_work[id_]
                work.hear(event.progress, now)
                bars.update(tasks[id_], description=f"{id_} {work.name}".rstrip(), completed=work.fraction)
                for task in bars.tasks:
                    if task.id == tasks[id_]:
                        task.total = (
                            None if work.finishing else 1.0
                        )  # without a total, the bar moves but promises nothing
            else:
                if id_ in tasks:
                    bars.remove_task(tasks.pop(id_))
                    del at_work[id_]
                _line(bars.console, event)

        yield watch


def _line(console: Console, event: Event) -> None:
    id_ = event.stage.id
    if event.kind == "started":
        console.print(f"[dim]start[/]  {id_:<24} [dim]{safe(event.reason)}[/]", highlight=False, soft_wrap=True)
    elif event.kind == "done" and event.artifact is not None:
        console.print(f"[green]done[/]   {id_:<24} {counts(event)}", highlight=False, soft_wrap=True)
    elif event.kind == "taken over":
        console.print(f"[cyan]kept[/]   {id_:<24} [dim]{safe(event.reason)}[/]", highlight=False, soft_wrap=True)
    elif event.kind == "failed":
        console.print(f"[red]failed[/] {id_}", highlight=False)
    elif event.kind == "again":
        console.print(f"[yellow]again[/]  {id_:<24} [dim]{safe(event.reason)}[/]", highlight=False, soft_wrap=True)
    elif event.kind == "damaged":
        console.print(
            f"[yellow]damaged[/] {id_:<23} [dim]will be made again: {safe(event.reason)}[/]",
            highlight=False,
            soft_wrap=True,
        )


def counts(event: Event) -> str:
    """`12,000 -> 11,500 in 8.1 s (near 480, reference 20)`."""
    assert event.artifact is not None
    rows = event.artifact.rows
    reasons = ", ".join(f"{safe(reason)} {count:,}" for reason, count in rows.dropped.items())
    return f"{rows.taken:,} -> {rows.kept:,} in {event.artifact.seconds:.1f} s" + (
        f" [dim]({reasons})[/]" if reasons else ""
    )
