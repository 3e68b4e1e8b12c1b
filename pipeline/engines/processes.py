"""Worker processes on this machine whose tasks may crash, hang or exhaust memory without affecting anything else.

Every worker has its own pipe, so a worker that dies in the middle of a message disturbs no other one. Workers are
forked from a server that has imported lodeset once, open no socket, and end when the process that uses them ends.

A task announces its current step (`step`). The system ends the worker when a step takes too long, and a thread of the
parent process ends it when it uses too much memory. The parent learns which step it was, and why.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable
from ctypes import c_longlong
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, cast

import cloudpickle
import psutil

from lodeset.pipeline.engines.failures import Failed, failed
from lodeset.pipeline.errors import LodesetError

Cause = Literal["killed", "too_slow", "stalled", "too_much_memory", "out_of_memory"]

# A worker that dies may have been killed from outside: its work is tried this many times.
TRIES = 3
# How long a new worker may take to answer: it is forked within milliseconds, unless the machine cannot start processes.
_START_S = 60.0
# Interval between memory checks. A decoder fills about 5 GB per second, so it overshoots by about 100 MB, which the
# margin covers.
_WATCH_S = 0.02
_MARGIN_BYTES = 256 * 2**20
# Imported once by the server that workers are forked from.
_PRELOADED = (
    "lodeset.pipeline.stages.ingest.run",
    "lodeset.pipeline.stages.write_shards",
    "lodeset.pipeline.engines.processes",
)


@dataclass(frozen=True)
class Died:
    """A task that did not finish: its last step, and the cause.

    Attributes:
        cause: its worker was `killed` (by a signal, or by itself), was ended because a step took too much processor
            time (`too_slow`) or too long by the clock (`stalled`) or because it used `too_much_memory`, or could get no
            more memory from the system (`out_of_memory`).
    """

    step: int
    cause: Cause
    detail: str


# Runs a function in a worker and returns the values that it yielded, its error, or how the worker died.
Again = Callable[..., "list[Any] | Failed | Died"]


@dataclass
class Task:
    """One call in a worker. `result` is the list of the function's values, its error, or how the worker died."""

    call: bytes
    memory_bytes: int | None = None
    result: list[Any] | Failed | Died | None = None


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    at: Any  # c_longlong in shared memory: the step
    task: Task | None = None
    too_large: bool = False
    watched: psutil.Process = field(init=False)

    def __post_init__(self) -> None:
        self.watched = psutil.Process(self.process.pid)


def task(function: Callable[..., Iterable[Any] | None], *arguments: Any, memory_bytes: int | None = None) -> Task:
    """`function(*arguments)` as a task; the values that it yields are returned as a list.

    `memory_bytes`: the worker is ended when it uses more.
    """
    return Task(cloudpickle.dumps((function, arguments)), memory_bytes)


# -- in a worker

_at: Any = None


def step(number: int, cpu_s: float = 0.0, wall_s: float = 0.0) -> None:
    """Announce that the running task has reached this step, which may take `cpu_s` seconds of this process's time and
    `wall_s` by the clock (0: no limit). Does nothing outside a worker.
    """
    if _at is None:
        return
    _at.value = number
    # The signals end the process: no Python handler runs while a decoder is in C code.
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def _serve(pipe: Connection, at: Any) -> None:
    global _at
    _at = at
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent process decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send_bytes(b"ready")
        while True:
            answer = _answer(pipe.recv_bytes())
            step(-1)
            pipe.send_bytes(answer)


def _answer(call: bytes) -> bytes:
    result: list[Any] | Failed | Died
    try:
        function, arguments = cloudpickle.loads(call)
        result = list(function(*arguments) or ())
    except MemoryError as error:
        result = Died(_at.value, "out_of_memory", f"it could not get memory: {error}".rstrip(": "))
    except Exception as error:
        result = failed(error)
    return cast(bytes, cloudpickle.dumps(result))


# -- in the parent process


class Pool:
    """Up to `count` workers, started when they are needed. For one thread at a time."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()  # between this thread and the one that watches memory
        self._watching: threading.Thread | None = None

    def start(self, task: Task) -> None:
        """Give the task to a worker, waiting for a free one."""
        while (worker := self._free()) is None:
            self._collect()
        try:
            worker.task, worker.too_large = task, False
            worker.at.value = -1
            worker.pipe.send_bytes(task.call)
        except (BrokenPipeError, ConnectionResetError):
            self._bury(worker)
            return
        if task.memory_bytes is not None and self._watching is None:
            self._watching = threading.Thread(target=self._watch, daemon=True)
            self._watching.start()

    def wait(self, task: Task) -> list[Any] | Failed | Died:
        """The result of a task that was started."""
        while task.result is None:
            self._collect()
        return task.result

    def run(self, task: Task) -> list[Any] | Failed | Died:
        self.start(task)
        return self.wait(task)

    def _free(self) -> _Worker | None:
        for worker in self._workers:
            if worker.task is None and worker.process.is_alive():
                return worker
        dead = [w for w in self._workers if w.task is None]
        for worker in dead:
            self._bury(worker)
        return self._new() if len(self._workers) < self.count else None

    def _new(self) -> _Worker:
        """A new worker that has answered."""
        problem = ""
        for _ in range(3):
            mine, theirs = self._context.Pipe()
            at = self._context.RawValue(c_longlong, -1)
            process: Any = self._context.Process(target=_serve, args=(theirs, at), daemon=True)
            try:
                process.start()
                theirs.close()
                if mine.poll(_START_S) and mine.recv_bytes() == b"ready":
                    worker = _Worker(process, mine, at)
                    with self._lock:
                        self._workers.append(worker)
                    return worker
                problem = f"none answered within {_START_S:.0f} s"
            except (OSError, EOFError, psutil.Error) as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
            mine.close()
            with contextlib.suppress(ValueError, AttributeError, OSError):
                process.kill()
        raise LodesetError(
            f"worker processes do not start on this machine ({problem}): free memory and processes, check `ulimit -u`, "
            "and run again; `lodeset doctor` tests it"
        )

    def _collect(self) -> None:
        """Wait for at least one worker that answers or ends."""
        busy = [w for w in self._workers if w.task is not None]
        ready = wait([w.pipe for w in busy] + [w.process.sentinel for w in busy])
        for worker in busy:
            # A worker that answered before it died counts as having answered.
            if worker.pipe in ready and self._answered(worker):
                continue
            if worker.process.sentinel in ready or worker.pipe in ready:
                self._bury(worker)

    def _answered(self, worker: _Worker) -> bool:
        try:
            answer = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            return False
        assert worker.task is not None
        worker.task.result, worker.task = cloudpickle.loads(answer), None
        return True

    def _bury(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.remove(worker)
        worker.process.join(5.0)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        if worker.task is not None:
            worker.task.result = _how(worker)
        worker.pipe.close()

    def _watch(self) -> None:
        while True:
            time.sleep(_WATCH_S)
            with self._lock:
                for worker in self._workers:
                    task = worker.task
                    if task is None or task.memory_bytes is None or worker.too_large:
                        continue
                    with contextlib.suppress(psutil.Error):
                        margin = min(_MARGIN_BYTES, task.memory_bytes // 4)
                        if worker.watched.memory_info().rss > task.memory_bytes - margin:
                            worker.too_large = True
                            worker.process.kill()


def _how(worker: _Worker) -> Died:
    at, code = int(worker.at.value), worker.process.exitcode or 0
    assert worker.task is not None
    if worker.too_large:
        return Died(
            at, "too_much_memory", f"its process came close to {(worker.task.memory_bytes or 0) / 2**30:.1f} GiB"
        )
    if -code == signal.SIGPROF:
        return Died(at, "too_slow", "it used up its processor time")
    if -code == signal.SIGALRM:
        return Died(at, "stalled", "it did not come to an end by the clock")
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
    return Died(at, "killed", f"its process ended with {how}")


@functools.cache
def pool(count: int) -> Pool:
    """The workers of this process: one shared pool, since starting the first worker takes most of a second."""
    return Pool(count)
