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

UsageError: Any = typer.BadParameter.__bases__[0]  # from the Click inside Typer, which exports nothing else of it


class Group(TyperGroup):
    """Typer turns an interrupt into a bare exit status; this group carries it through to the caller of `perform`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(stop) from None


class _Stopped(Exception):
    """Carries a KeyboardInterrupt through Typer."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        super().__init__()
        self.stop = stop


def perform(app: typer.Typer) -> int:
    """Run the command line and return its exit status. A user's mistake ends in one message, never in a traceback.

    Raises:
        KeyboardInterrupt: the command was stopped.
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
        message = _explained(error)
        if message is None:
            err.print(escape(traceback.format_exc()), soft_wrap=True)
            message = (
                f"{type(error).__name__}: {error}. This is a defect in lodeset: please report it with the output above"
            )
        return _failed(message, 1)


def _explained(error: Exception) -> str | None:
    """A sentence about an unexpected error, if the machine or a driver caused it."""
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
    """Report a command line that cannot be understood; `lodeset` alone shows its help."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help has already been printed
        return int(error.exit_code)
    help_ = f" (see `{error.ctx.command_path} --help`)" if error.ctx is not None else ""
    return _failed(f"{error.format_message().rstrip('.')}{help_}", error.exit_code)
