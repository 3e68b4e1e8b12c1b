"""Start lodeset's own Python processes by module, in any working directory, and end them with the process that started
them.

A working directory may contain a user's own `lodeset.py`, `training/` or `pipeline/`. Python puts it first on the
import path of `python -m` and of `python -c`, and Ray adds it to that of its workers. Therefore every process gets a
safe path (`PYTHONSAFEPATH`) on which the folder that this lodeset was imported from comes first.

A child's standard input is a pipe that the parent process holds and through which it sends a task. The pipe closes when
the parent ends, however it ends, and the child then calls the function that it registered (`when_asker_ends`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

import lodeset


def import_path() -> dict[str, str]:
    """Environment variables with which a Python process imports what this one imports, and this lodeset before any
    other.
    """
    root = str(Path(lodeset.__path__[0]).parent)
    others = [path for path in sys.path if path and path != root]
    return {"PYTHONPATH": os.pathsep.join([root, *others]), "PYTHONSAFEPATH": "1"}


def started(
    module: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    session: bool = True,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """A process that runs `lodeset.<module>`, whose standard input is a pipe.

    Args:
        environment: variables in addition to those of this process.
        session: whether it gets its own session, which Ctrl-C does not reach and which can be ended as a whole.
    """
    return subprocess.Popen(
        [sys.executable, "-m", f"lodeset.{module}", *arguments],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        env={**os.environ, **(environment or {}), **import_path()},
        start_new_session=session,
    )


def send(stdin: IO[bytes] | None, message: bytes) -> None:
    """Send a message to a child's standard input; a child that has already ended gets none."""
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError):
        stdin.write(len(message).to_bytes(8, "little") + message)
        stdin.flush()


def started_at(pid: int) -> str:
    """When a process began, in a form that tells it from any other process of the same number: on Linux in clock ticks since
    the machine started, because the time of day may be set back while the process runs.

    Raises:
        psutil.Error: there is no such process.
    """
    try:
        # Fields are counted from the last parenthesis: the name before it may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[19]
    except (OSError, IndexError):
        return str(psutil.Process(pid).create_time())


def let_go(child: subprocess.Popen[bytes]) -> None:
    """Close a child's standard input, as the end of this process would."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()


# -- in the child


def received() -> bytes:
    """The next message that the parent process sent; empty if it has ended or closed the pipe."""
    return _read(int.from_bytes(_read(8), "little"))


def _read(size: int) -> bytes:
    """As many bytes of standard input, or fewer at its end. Without a buffer, whose lock a waiting thread would hold when Python
    ends.
    """
    pieces = []
    while size and (piece := os.read(sys.stdin.fileno(), size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def when_asker_ends(act: Callable[[], Any], heard: Callable[[bytes], Any] = lambda message: None) -> None:
    """Call `act` in a thread as soon as the parent process has ended or closed the pipe, and `heard` with each message until then.
    Must be called after the task was received.
    """

    def watch() -> None:
        while message := received():
            heard(message)
        act()

    threading.Thread(target=watch, daemon=True).start()
