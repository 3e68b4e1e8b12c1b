"""Work in a process of its own, which does not outlive whoever asked for it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeVar

from lodeset.pipeline.errors import LodesetError

Result = TypeVar("Result")


def apart(function: Callable[..., Result], *arguments: Any, leave_s: float = 60.0) -> Result:
    """What `function` returns, or raises, in a process of its own; the function and its arguments must pickle.

    When this process leaves the call without an answer, interrupted or killed, the other is interrupted, as by Ctrl-C, and
    ended `leave_s` seconds later if it still goes on (a local Ray takes up to 20 to end).

    Raises:
        LodesetError: the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, leave_s, function, arguments))
    # Held back until the other process has imported what it needs and can end in words.
    resource_tracker.ensure_running()  # when it starts one itself, it lets interrupts through again
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
    theirs.close()
    try:
        told = ours.recv_bytes()
    except (EOFError, OSError):
        from lodeset.pipeline.dag.child import LOST_RAY  # loads pyarrow

        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code} (9: often for want of memory)" if code < 0 else f"ended with status {code}"
        if code == LOST_RAY:
            how = "lost the local Ray cluster (killed, or out of memory)"
        raise LodesetError(f"the process at work {how}; the same again goes on from what is finished") from None
    finally:
        ours.close()
        process.join()
    done, answer = pickle.loads(told)
    if not done:
        raise answer
    return answer  # type: ignore[no-any-return]


def _work(pipe: Connection, leave_s: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    left = threading.Event()
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as scripts start what they do not wait for

    def interrupt(number: int, frame: FrameType | None) -> None:
        """Once: Ctrl-C reaches both processes, and what the first interrupt began to give back is not to be interrupted."""
        if left.is_set() or not ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt

    def watch() -> None:
        """Nothing is ever sent this way: the pipe speaks when its other end is closed."""
        pipe.poll(None)
        left.set()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(leave_s)
        os._exit(1)

    signal.signal(signal.SIGINT, interrupt)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        threading.Thread(target=watch, daemon=True).start()
        told = pickle.dumps((True, function(*arguments)))
    except BaseException as error:
        told = _failure(error)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once told, the other end closes, and that is no interrupt
    with contextlib.suppress(ConnectionError):
        pipe.send_bytes(told)
    sys.stdout.flush()
    sys.stderr.flush()
    # Engines leave threads and atexit hooks that can hang; everything is committed by now.
    os._exit(0)


def _failure(error: BaseException) -> bytes:
    """What is told of an error: itself, or its words where it does not survive pickling."""
    if isinstance(error, SystemExit):  # how Ray Train ends when it is interrupted
        error = KeyboardInterrupt()
    if not isinstance(error, LodesetError):
        error.add_note(f"In a process of its own:\n{''.join(traceback.format_exception(error))}")
    try:
        told = pickle.dumps((False, error))
        pickle.loads(told)
    except Exception:
        instead = RuntimeError(f"{type(error).__name__}: {error}")
        instead.__notes__ = getattr(error, "__notes__", [])
        told = pickle.dumps((False, instead))
    return told
