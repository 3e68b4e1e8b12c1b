"""What a process of its own is given to do, importable there; by itself, a process that waits for one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from lodeset.infra.apart import apart
from lodeset.pipeline.errors import HeldError


def pid() -> int:
    return os.getpid()


def held() -> None:
    raise HeldError("another run holds it")


def broken() -> None:
    raise ZeroDivisionError("by nothing")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class OfTwo(Exception):
    """Pickles, and does not come back."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} of {other}")


def of_two() -> None:
    raise OfTwo("half", "it")


def unpicklable() -> object:
    return threading.Lock()


def left() -> None:
    sys.exit(0)


def stubborn(folder: Path) -> None:
    """Heeds no interrupt."""
    _mark(folder)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(600)


def hold(folder: Path) -> None:
    """Says which process holds the folder, as long as one does; giving it back takes a moment."""
    mark = _mark(folder)
    try:
        time.sleep(600)
    finally:
        time.sleep(0.5)
        mark.rename(folder / "given-back")


def _mark(folder: Path) -> Path:
    (folder / "being-written").write_text(str(os.getpid()))
    return (folder / "being-written").rename(folder / "held")


if __name__ == "__main__":
    what, folder, leave_s, interrupts = sys.argv[1:]
    # Whoever runs the tests may ignore SIGINT, as what scripts start in the background does; that is inherited.
    signal.signal(signal.SIGINT, {"heeded": signal.default_int_handler, "ignored": signal.SIG_IGN}[interrupts])
    apart({"hold": hold, "stubborn": stubborn}[what], Path(folder), leave_s=float(leave_s))
