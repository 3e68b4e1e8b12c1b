"""How a command ends: its exit status, and one message for whatever went wrong."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from lodeset.infra.cli.options import err, print_json
from lodeset.pipeline.dag.files import is_of_a_driver, unreachable
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.shown import shown

UsageError: Any = typer.BadParameter.__bases__[0]  # Typer brings a Click of its own and shows no more of it


class Group(TyperGroup):
    """Typer turns an interrupt into a bare exit status; here it stays what it is until `perform` returns it to its caller."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(stop) from None


class _Stopped(Exception):
    """A KeyboardInterrupt on its way through Typer."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        super().__init__()
        self.stop = stop


def perform(app: typer.Typer) -> int:
    """Runs the command that was typed; its exit status. A user's mistake ends in one message, never in a traceback.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    try:
        # A command returns nothing; an early exit (`--help`) returns its status.
        return int(app(standalone_mode=False) or 0)
    except _Stopped as stopped:
        raise stopped.stop from None
    except LodesetError as error:
        return _failed(str(error), error.exit_code, lines=isinstance(error, ConfigError))
    except UsageError as error:
        return _misused(error)
    except BrokenPipeError:
        return 1
    except (typer.Abort, EOFError):
        return 1
    except Exception as error:
        told = _explained(error)
        if told is None:
            err.print(escape(traceback.format_exc()), soft_wrap=True)
            told = (
                f"{type(error).__name__}: {error}. This is a defect of lodeset: please report it with what stands above"
            )
        return _failed(told, 1)


def _explained(error: Exception) -> str | None:
    """A sentence about what no code of lodeset's foresaw, where it is the machine's or a driver's doing."""
    if isinstance(error, MemoryError):
        return "out of memory: close other programs, or give fewer cores (resources.cpus, --cpus)"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return unreachable("what the configuration or the command names", error) if is_of_a_driver(error) else None


def _failed(message: str, code: int, lines: bool = False) -> int:
    if "--json" in sys.argv:
        print_json({"error": shown(message, lines), "exit_code": code})
    err.print(f"[bold red]error:[/] {escape(shown(message, lines))}", soft_wrap=True)
    return code


def _misused(error: UsageError) -> int:
    """A command that cannot be understood; `lodeset` alone shows what there is."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already
        return int(error.exit_code)
    help_ = f" (`{error.ctx.command_path} --help` says what it takes)" if error.ctx is not None else ""
    return _failed(f"{error.format_message().rstrip('.')}{help_}", error.exit_code)
