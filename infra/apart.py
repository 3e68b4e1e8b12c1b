"""Work in a process of its own, which does not outlive whoever asked for it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeVar

from pipeline.errors import LodesetError

Result = TypeVar("Result")

LEAVE_SECONDS = 60.0  # what an interrupted process has to give back what it holds; Ray takes up to 20 to end


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """What `function` returns, or raises, in a process of its own; both and `arguments` must pickle.

    When this process leaves the call without an answer, interrupted or killed, the other is interrupted, as by Ctrl-C, and
    ended 60 s later if it still goes on.

    Raises:
        LodesetError: the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        answered, answer = ours.recv()
    except (EOFError, ConnectionError):
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code} (9: often for want of memory)" if code < 0 else f"ended with status {code}"
        raise LodesetError(f"the process at work {how}; the same again goes on from what is finished") from None
    finally:
        ours.close()
        process.join()
    if not answered:
        raise answer
    return answer  # type: ignore[no-any-return]


def _work(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, _interrupt)
    threading.Thread(target=_watch, args=(pipe,), daemon=True).start()
    try:
        told = True, function(*arguments)
    except LodesetError as error:
        told = False, error
    except BaseException as error:
        error.add_note(f"In a process of its own:\n{traceback.format_exc()}")
        told = False, error
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once told, the other end closes, and that is no interrupt
    with contextlib.suppress(ConnectionError):
        pipe.send(told)
    sys.stdout.flush()
    sys.stderr.flush()
    # Engines leave threads and atexit hooks that can hang; everything is committed by now.
    os._exit(0)


def _watch(pipe: Connection) -> None:
    """Nothing is ever sent this way: the pipe speaks when its other end is closed."""
    pipe.poll(None)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(LEAVE_SECONDS)
    os._exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Once: Ctrl-C reaches both processes, and what the first interrupt began to give back is not to be interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
