"""The process that runs one stage.

It is started by the runner in a session of its own, reads its task from standard input, and keeps reading: the pipe closes
when the runner ends, however it ends, and then the whole session is killed. Nothing outlives the runner.

What it tells the runner goes through a pipe as JSON lines: `{"progress": [fraction, count, unit]}`, then `{"outcome": ...}` or
`{"error": ..., "exit_code": n}`. With `{"wants": "ray"}` it asks for a Ray cluster; the answer comes through standard input. Its
standard output and error are the stage's log file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle

from lodeset.pipeline.children import received, when_asker_ends
from lodeset.pipeline.dag.cluster import lost_a_worker
from lodeset.pipeline.dag.stage import Context, Outcome, Progress, as_mapping
from lodeset.pipeline.errors import LodesetError, replaced_source
from lodeset.pipeline.remote.retries import told_of

# Every worker inherits these. Oversubscribed BLAS threads cost far more than they give; each engine gives its workers
# the cores that it means them to use.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "WDS_SECURE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}


# What the process of a stage is told of its Ray cluster, as JSON.
RAY_OPTIONS = "LODESET_RAY_OPTIONS"
# The exit status of a process whose Ray cluster is gone, and of one that asked for what no node can give.
LOST_RAY, NO_ROOM = 71, 72
# What is called with what a stage waits for, or with nothing.
_TOLD: list[Callable[[str], None]] = []


# What asks the runner for something.
_ASK: list[Callable[[str], dict[str, Any]]] = []
_REPORTED: list[Callable[[str, Progress], None]] = []


def ray_on_demand() -> str:
    """The address of the local Ray cluster, which the runner starts unless it runs already.

    Raises:
        LodesetError: it did not start.
    """
    waits_for("Ray, which starts on this machine")
    (ask,) = _ASK
    answer = ask("ray")
    waits_for("")
    if "error" in answer:
        raise LodesetError(answer["error"])
    os.environ.update(answer["environment"])
    return str(answer["address"])


@contextlib.contextmanager
def reported_to(note: Callable[[str, Progress], None]) -> Iterator[None]:
    """While the block runs, `note` is called with the name of the stage and its progress, too."""
    _REPORTED.append(note)
    try:
        yield
    finally:
        _REPORTED.remove(note)


def waits_for(why: str) -> None:
    """Tell the runner what this process waits for, e.g. a free GPU; an empty text if nothing."""
    for tell in _TOLD:
        tell(why)


def last_line(error: BaseException) -> str:
    """What an error says without the traceback that engines put before it; that is in the log."""
    return (str(error).strip().splitlines() or [""])[-1]


def perform(payload: bytes, tell: Callable[[dict[str, Any]], None]) -> None:
    """Runs the stage of a pickled task. Tells its progress, and in the end its outcome or its error."""

    last = Progress(0.0)

    def report(progress: Progress) -> None:
        nonlocal last
        last = progress
        for note in _REPORTED:
            note(context.stage.name, progress)
        tell({"progress": dataclasses.astuple(progress)})

    def waits(why: str) -> None:
        if why != last.waits_for:
            report(dataclasses.replace(last, waits_for=why))

    _TOLD[:] = [waits]
    try:
        task: dict[str, Any] = cloudpickle.loads(payload)
        os.environ[RAY_OPTIONS] = json.dumps(task.pop("ray"))
        also = tuple(Context(**other, report=lambda _: None) for other in task.pop("also"))
        context = Context(**task, report=report, also=also)
        with context.store.explained(f"stage {context.stage.id}"), told_of(context.stage.id):
            outcome: Outcome = context.stage.function(context)
        tree = {**dataclasses.asdict(outcome), "details": as_mapping(outcome.details)}
        tell({"outcome": tree, "used": context.store.used()})
    except LodesetError as error:
        replaced = replaced_source(str(error))
        if replaced is not None:
            context.store.note({"path": replaced[0], "why": replaced[1], "source": "yes"})
        tell({"error": str(error), "exit_code": error.exit_code})
    except MemoryError:
        tell(
            {
                "error": f"{context.stage.id} ran out of memory: give it fewer cores (resources.cpus) or smaller parts",
                "exit_code": 1,
            }
        )
    except BaseException as error:
        traceback.print_exc()
        told = f"{type(error).__name__}: {last_line(error)}"
        tell({"error": told, "exit_code": 1, "unexpected": True, "lost": lost_a_worker(error)})


def main(descriptor: int) -> None:
    """Runs the stage whose task comes through standard input, and ends this process; `descriptor` is its channel."""
    payload = received()
    answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    when_asker_ends(lambda: os.killpg(os.getpgid(0), signal.SIGKILL), answers.put)
    channel = os.fdopen(descriptor, "w", encoding="utf-8")
    lock = threading.Lock()

    def tell(message: dict[str, Any]) -> None:
        with lock:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

    def ask(what: str) -> dict[str, Any]:
        tell({"wants": what})
        answer: dict[str, Any] = json.loads(answers.get())
        return answer

    _ASK[:] = [ask]
    perform(payload, tell)
    with contextlib.suppress(BrokenPipeError):
        channel.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Engines leave threads and atexit hooks that can hang; everything is committed by now.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
