"""The errors that end a run with a message to the user."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator


class LodesetError(Exception):
    """A failure that the user can act on. The message names the thing, the numbers and the way out, and is all that is
    shown.
    """

    exit_code = 1


class ConfigError(LodesetError):
    """The configuration or the command line is wrong; nothing was run."""

    exit_code = 2


class GateError(LodesetError):
    """A stage finished its measurement and found that a limit is exceeded (e.g. the limit of dedup on the size of a
    component).
    """

    exit_code = 3


class HeldError(LodesetError):
    """Another run holds what this one needs, or a rollback forbids it."""

    exit_code = 4


class LostError(LodesetError):
    """A worker, a node or a whole cluster was lost; the work can be done again."""


class DamagedError(LodesetError):
    """A file of the store is missing or has changed; `why` says which."""

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why


_REPLACED = "the bytes of {uri} are no longer those that were ingested ({why})"
_IS_REPLACED = re.compile(r"the bytes of (.+) are no longer those that were ingested \((.*?)\)", re.DOTALL)


def source_replaced(uri: str, why: str) -> LodesetError:
    """The error for a source whose size and time match the listing but whose bytes do not."""
    problem = _REPLACED.format(uri=uri, why=why)
    return LodesetError(f"{problem}: run again, and ingest will read the new ones")


def replaced_source(message: str) -> tuple[str, str] | None:
    """The source that an error is about, and the reason; None if the error is about something else. Engines only pass
    on messages.
    """
    match = _IS_REPLACED.search(message)
    return (match.group(1), match.group(2)) if match is not None else None


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends what it interrupts as Ctrl-C does."""


@contextlib.contextmanager
def ends_like_an_interrupt() -> Iterator[None]:
    """While the block runs, SIGTERM raises Terminated, so that children are ended and claims are released."""

    def interrupt(number: int, frame: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
