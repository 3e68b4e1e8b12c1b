"""What is told of a run on standard error."""

import io
import time

import pytest
from rich.console import Console
from toy_stages import count

from lodeset.infra.cli import progress
from lodeset.infra.cli.progress import Work, watching
from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.dag.stage import Progress, Stage

STAGE = Stage("dedup", "pool", 1, "ray", count, {})


@pytest.mark.parametrize(("kind", "terminal"), [("started", False), ("taken over", False), ("taken over", True)])
@pytest.mark.parametrize("reason", ['files.0 "a[/b].tar" -> "c.tar"', 'label "[red]" -> "[bold]"'])
def test_reasons_are_shown_as_they_are(kind: str, terminal: bool, reason: str) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, no_color=True)
    with watching(console) as watch:
        watch(Event(kind, STAGE, reason=reason))  # type: ignore[arg-type]  # a parameter
    assert reason in out.getvalue()


def heard(*told: Progress) -> Work:
    """One second between each."""
    work = Work(0.0, 0.0)
    for second, one in enumerate(told, 1):
        work.hear(one, float(second))
    return work


def test_progress_never_goes_back_and_its_end_is_no_100_percent() -> None:
    work = heard(Progress(0.2, 10), Progress(0.5, 30), Progress(0.4, 20))
    assert (work.fraction, work.count) == (0.5, 30)
    work.hear(Progress(1.0, 60), 4.0)
    assert work.line(5.0) == "finishing, 12 images/s"
    assert "100" not in work.line(5.0)


def test_phases_are_named_and_counted() -> None:
    work = heard(Progress(0.5, 30, "images", "search"), Progress(0.25, 100, "pairs", "verify"))
    assert work.line(3.0) == "verify, 25%"
    assert (work.fraction, work.begun) == (0.25, 2.0)
    for second, fraction in enumerate((1.0, 0.0, 0.25, 0.5), 3):
        work.hear(Progress(fraction, 0, "pairs", "verify"), float(second))
    assert work.line(6.0) == "verify, round 2, 50%, 2 s left"


def test_what_an_earlier_run_had_done_does_not_shorten_the_time_left() -> None:
    work = heard(Progress(0.8, 0), Progress(0.8, 0))
    work.hear(Progress(0.9, 10), 11.0)
    assert work.left(11.0) == "11 s left"


def test_silence_is_told() -> None:
    work = heard(Progress(0.5, 10), *[Progress(0.5, 10)] * 40)
    assert work.left(20.0) != "no news for 40 s" == work.left(41.0)
    work.hear(Progress(0.5, 11), 42.0)
    assert "no news" not in work.left(43.0)


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.1)
    out = io.StringIO()
    with watching(Console(file=out, width=200)) as watch:
        watch(Event("started", STAGE, reason="not made yet"))
        watch(Event("progress", STAGE, Progress(0.25, 10, "pairs", "verify")))
        time.sleep(0.5)
        watch(Event("failed", STAGE))
        told = out.getvalue()
        time.sleep(0.3)
    assert told.count("still  dedup/pool") >= 3 and "verify, 25%" in told
    assert out.getvalue() == told


def test_a_bar_moves_on_and_names_what_is_done() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, no_color=True)
    with watching(console) as watch:
        watch(Event("started", STAGE))
        for fraction in (0.5, 1.0):
            watch(Event("progress", STAGE, Progress(fraction, 10, "pairs", "verify")))
            time.sleep(0.3)
    drawn = out.getvalue()
    assert "dedup/pool verify" in drawn and " 50 %" in drawn
    assert "dedup/pool verify: finishing" in drawn and "100 %" not in drawn
