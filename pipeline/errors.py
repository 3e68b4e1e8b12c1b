"""What a user is told when a run cannot go on."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator


class LodesetError(Exception):
    """A failure that the user can act on; the message names the thing, the numbers and the way out, and is all that is shown."""

    exit_code = 1


class ConfigError(LodesetError):
    """The configuration or the command line is wrong; nothing was run."""

    exit_code = 2


class GateError(LodesetError):
    """A stage finished its measurement and found that a limit is breached (e.g. the component-size guard of dedup)."""

    exit_code = 3


class HeldError(LodesetError):
    """Another run holds what this one needs."""

    exit_code = 4


class DamagedError(LodesetError):
    """A file of the store is missing, or is not what was written; `why` says which."""

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why


_REPLACED = "the bytes of {uri} are no longer those that were ingested ({why})"
_IS_REPLACED = re.compile(r"the bytes of (.+) are no longer those that were ingested \((.*?)\)", re.DOTALL)


def source_replaced(uri: str, why: str) -> LodesetError:
    """What to raise for a source whose size and time are those that were listed, and whose bytes are not."""
    told = _REPLACED.format(uri=uri, why=why)
    return LodesetError(f"{told}: run again, ingest will read the new ones")


def replaced_source(message: str) -> tuple[str, str] | None:
    """Which source an error is about, and why; None where it is about something else. Engines hand on messages alone."""
    found = _IS_REPLACED.search(message)
    return (found.group(1), found.group(2)) if found is not None else None


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends what it interrupts as Ctrl-C does."""


@contextlib.contextmanager
def ends_like_an_interrupt() -> Iterator[None]:
    """While the block runs, SIGTERM raises Terminated: children are swept, claims given back."""

    def interrupt(number: int, frame: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: the caller's signals are its own
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
