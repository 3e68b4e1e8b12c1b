"""A process that has imported what stages need, and forks a process for each of them.

Importing torch, Beam and pyarrow takes 2 to 3 s of a core. A run of a few new images would spend most of its time on that if
every stage's process did it anew.

The host has a single thread and opens nothing while it imports, so its forks are whole. It is asked through a socket: one byte, with
the file descriptors that the new process gets as standard input, channel and output. It answers with lines: `pid N` when it has
forked, `ended N STATUS` when that process has ended. It ends when the socket does.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from lodeset.pipeline import children
from lodeset.pipeline.dag.child import ENVIRONMENT, main
from lodeset.pipeline.dag.launched import ChildProcess, Launched, keep_log

# What the processes of most stages import. Not Ray: it reads its settings from the environment when it is imported, and a cluster's
# token is known only later.
_COMMON = ("numpy", "pyarrow.dataset", "pyarrow.parquet", "torch")
_ASKED = b"f"
_FORK_S = 60.0  # within which the host answers: it may be in the middle of an import


@contextlib.contextmanager
def forking(modules: Sequence[str]) -> Iterator[Callable[[bytes, Path], Launched]]:
    """What starts the processes of stages while the block lasts: forks of one host that imports `modules` in their order, or
    processes of their own where forks are not safe (macOS) or the host is gone.
    """
    if sys.platform != "linux":
        yield ChildProcess
        return
    host: _Host | None = None

    def launch(task: bytes, log: Path) -> Launched:
        nonlocal host
        try:
            host = host or _Host(modules)
            return _Forked(host, task, log)
        except OSError:
            return ChildProcess(task, log)

    try:
        yield launch
    finally:
        if host is not None:
            host.close()


class _Host:
    """The host, as the runner sees it. For one thread."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            wanted = list(dict.fromkeys([*modules[:1], *_COMMON, *modules[1:]]))
            self._process = children.started(
                "pipeline.dag.forking",
                str(theirs.fileno()),
                *wanted,
                environment=ENVIRONMENT,
                pass_fds=[theirs.fileno()],
            )
        self._socket.settimeout(_FORK_S)
        self._buffer = b""
        self._ended: dict[int, int] = {}

    def fork(self, stdin: int, channel: int, output: int) -> int:
        """The pid of a new process that has these file descriptors.

        Raises:
            OSError: the host is gone, or does not answer.
        """
        socket.send_fds(self._socket, [_ASKED], [stdin, channel, output])
        while True:
            word, *numbers = self._line().split()
            if word == b"pid":
                return int(numbers[0])
            self._ended[int(numbers[0])] = int(numbers[1])

    def wait(self, pid: int) -> int:
        """The exit status of a process that has ended, or is about to; that of a killed one where the host is gone."""
        self._socket.settimeout(None)
        try:
            while pid not in self._ended:
                _, number, status = self._line().split()
                self._ended[int(number)] = int(status)
        except OSError:
            self._ended[pid] = -signal.SIGKILL
        self._socket.settimeout(_FORK_S)
        return self._ended[pid]

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            more = self._socket.recv(4096)
            if not more:
                raise ConnectionResetError("the process that starts stages has ended")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> None:
        self._socket.close()
        children.let_go(self._process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5.0)
        self._process.kill()
        self._process.wait()


class _Forked:
    """A stage's process that the host has forked; what it prints goes to `log`."""

    def __init__(self, host: _Host, task: bytes, log: Path) -> None:
        """Raises OSError: the host is gone, or does not answer."""
        self._host = host
        stdin, given = os.pipe()
        self.channel, told = os.pipe()
        printed, output = os.pipe()
        try:
            self.pid = host.fork(stdin, told, output)
        except OSError:
            for mine in (given, self.channel, printed):
                os.close(mine)
            raise
        finally:
            for theirs in (stdin, told, output):
                os.close(theirs)
        self._logger = threading.Thread(target=keep_log, args=(os.fdopen(printed, "rb"), log), daemon=True)
        self._logger.start()
        self._stdin: IO[bytes] = os.fdopen(given, "wb")
        variables = {**os.environ, **ENVIRONMENT, **children.import_path()}
        children.send(self._stdin, json.dumps(variables).encode())
        children.send(self._stdin, task)

    def answer(self, message: bytes) -> None:
        children.send(self._stdin, message)

    def wait(self) -> int:
        return self._host.wait(self.pid)

    def sweep(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        self._logger.join(timeout=5.0)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()


# -- in the host


def _serve(control: socket.socket, modules: list[str]) -> None:
    """Forks when it is asked, and imports while it is not: the first module before anything else, as the first stage needs it."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    if modules:
        _import(modules.pop(0))
    while True:
        ready, _, _ = select.select([control.fileno(), wake], [], [], 0 if modules else None)
        if not ready:
            _import(modules.pop(0))
        if wake in ready:
            os.read(wake, 4096)
            for pid, status in _reaped():
                control.sendall(b"ended %d %d\n" % (pid, status))
        if control.fileno() in ready:
            asked, given, _, _ = socket.recv_fds(control, 1, 3)
            if not asked:
                return
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for mine in (wake, woken):
                    os.close(mine)
                control.close()
                _become(*given)
            for theirs in given:
                os.close(theirs)
            control.sendall(b"pid %d\n" % pid)


def _import(module: str) -> None:
    # A stage that needs a module which cannot be imported says so itself.
    with contextlib.suppress(Exception):
        importlib.import_module(module)


def _reaped() -> Iterator[tuple[int, int]]:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def _become(stdin: int, channel: int, output: int) -> None:
    """Run a stage in this process, and end it."""
    try:
        os.setsid()
        for place, given in enumerate((stdin, output, output)):
            os.dup2(given, place)
        for given in {stdin, output} - {0, 1, 2}:
            os.close(given)
        os.environ.clear()
        os.environ.update(json.loads(children.received()))
        sys.argv = [sys.argv[0]]
        main(channel)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
    os._exit(0)
