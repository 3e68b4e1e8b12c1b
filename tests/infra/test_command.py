"""How commands end, and what of what they print may act or give away."""

from __future__ import annotations

import io
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from rich.table import Table

from lodeset.infra.cli.command import perform
from lodeset.infra.cli.main import app
from lodeset.infra.cli.options import Screen, print_json, safe
from lodeset.infra.cli.tables import show


def perform_typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lodeset", *arguments])
    return perform(app)


def test_version_and_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert perform_typed(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"lodeset {version('lodeset')}\n"
    assert perform_typed(monkeypatch, "--help") == 0
    assert "doctor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fly"], "No such command 'fly'"),
        (["plan"], "Missing argument 'CONFIG'"),
        (["plan", "x.yaml", "--limit", "none"], "Invalid value for '--limit'"),
        (["export", "a", "b", "c"], "unexpected extra argument"),
    ],
)
def test_bad_usage_is_one_line_and_json_where_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert perform_typed(monkeypatch, *arguments, "--json") == 2
    printed = capsys.readouterr()
    assert told in printed.err and len(printed.err.splitlines()) == 1
    assert json.loads(printed.out)["exit_code"] == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "error: /x/y: Permission denied"),
        (MemoryError(), "error: out of memory"),
        (type("EndpointError", (Exception,), {"__module__": "botocore.x"})("no answer"), "cannot be reached"),
        (KeyError("https://u:hidden@h/x"), "a defect in lodeset"),
    ],
)
def test_what_nobody_foresaw(capsys: pytest.CaptureFixture[str], error: Exception, told: str) -> None:
    broken = typer.Typer()

    @broken.command()
    def fails() -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lodeset"])
        assert perform(broken) == 1
    said = capsys.readouterr().err
    assert told in said
    assert "hidden" not in said
    assert ("Traceback" in said) == isinstance(error, KeyError)


HOSTILE = "a\x1b[2J\x1b]0;title\x07\u202eb :bomb: https://me:pass@host/x?sig=abcd"


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_acts_on_a_terminal_or_is_given_away(terminal: bool) -> None:
    written = io.StringIO()
    screen = Screen(file=written, force_terminal=terminal, width=300, no_color=True)
    screen.print(safe(HOSTILE), soft_wrap=True)
    screen.print(f"[bold]{safe(HOSTILE)}[/]")
    with screen.status(safe(HOSTILE)) if terminal else screen.capture():
        screen.print(HOSTILE)
    text = written.getvalue()
    assert r"a\x1b[2J\x1b]0;title\x07\u202eb :bomb: https://***@host/x?sig=***" in text
    for sign in ("\x1b[2J", "\x1b]0", "\x07", "\u202e", "pass", "abcd"):
        assert sign not in text


def test_what_goes_into_a_pipe_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.print("word " * 200)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_json_gives_nothing_away_and_is_ascii(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    print_json({"files": [str(tmp_path)], "why": [HOSTILE]})
    out = capsys.readouterr().out
    assert out.isascii() and "\x1b" not in out and "pass" not in out
    assert json.loads(out)["files"] == [str(tmp_path)]


def test_tables_of_a_pipe_are_not_padded(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", "told", box=None, pad_edge=False)
    table.add_row("a", "x" * 300)
    table.add_row("b", "")
    show(Screen(), table)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert (heading, second) == ("name  told", "b")
    assert first == f"a     {'x' * 300}"
