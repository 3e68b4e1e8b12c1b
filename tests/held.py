"""What a process of its own is given to do, importable there; by itself, a process that waits for one."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from infra.apart import apart
from pipeline.errors import HeldError


def pid() -> int:
    return os.getpid()


def held() -> None:
    raise HeldError("another run holds it")


def broken() -> None:
    raise ZeroDivisionError("by nothing")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hold(folder: Path) -> None:
    """Says which process holds the folder, as long as one does; giving it back takes a moment."""
    mark = folder / "held"
    (folder / "being-written").write_text(str(os.getpid()))
    (folder / "being-written").rename(mark)
    try:
        time.sleep(600)
    finally:
        time.sleep(0.5)
        mark.rename(folder / "given-back")


if __name__ == "__main__":
    apart(hold, Path(sys.argv[1]))
