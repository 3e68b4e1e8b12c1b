"""A stage's child process, as the runner sees it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import IO, Protocol

from lodeset.pipeline import children
from lodeset.pipeline.dag.child import ENVIRONMENT
from lodeset.pipeline.shown import shown

# How long the log may take to be complete once the process has ended.
_LOG_S = 5.0


class Launched(Protocol):
    """A stage at work. `channel` is a pipe of JSON lines, which ends when the stage does."""

    channel: int

    def answer(self, message: bytes) -> None:
        """Sends the stage what it asked for through its channel."""
        ...

    def wait(self) -> int:
        """The exit status, once the stage has ended; of one that was killed, the negative number of the signal."""
        ...

    def sweep(self) -> None:
        """Ends everything that is left of the stage, and completes its log."""
        ...


class ChildProcess:
    """Runs the stage of a pickled task in a process and a session of its own; what it prints goes to `log`."""

    def __init__(self, task: bytes, log: Path) -> None:
        self.channel, write = os.pipe()
        self._process = children.started(
            "pipeline.dag.child",
            str(write),
            environment=ENVIRONMENT,
            pass_fds=[write],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._logger = threading.Thread(target=keep_log, args=(self._process.stdout, log), daemon=True)
        self._logger.start()
        os.close(write)
        children.send(self._process.stdin, task)

    def answer(self, message: bytes) -> None:
        children.send(self._process.stdin, message)

    def wait(self) -> int:
        return self._process.wait()

    def sweep(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._logger.join(timeout=_LOG_S)
        children.let_go(self._process)


_COLOUR = re.compile("\x1b\\[[0-9;]*m")  # Ray prints in colours


def keep_log(stream: IO[bytes], path: Path) -> None:
    """Writes down what a stage prints, without secrets and acting characters. The pipe is emptied even when the disk is full: a
    stage must not fail, or hang, because its log cannot be written."""
    with stream:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                begun = b""
                while data := os.read(stream.fileno(), 65536):
                    *lines, begun = (begun + data).split(b"\n")
                    if len(begun) > 65536:
                        lines, begun = [*lines, begun], b""
                    file.write(b"".join(_shown(line) + b"\n" for line in lines))
                file.write(_shown(begun))
        except OSError:
            while os.read(stream.fileno(), 65536):
                pass


def _shown(line: bytes) -> bytes:
    return shown(_COLOUR.sub("", line.decode(errors="backslashreplace").rstrip("\r")), lines=True).encode()
