"""Work in a process of its own, which does not outlive whoever asked for it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import cloudpickle

from lodeset.pipeline import children
from lodeset.pipeline.errors import LodesetError

Result = TypeVar("Result")


def apart(function: Callable[..., Result], *arguments: Any, leave_s: float = 60.0) -> Result:
    """What `function` returns, or raises, in a process of its own; the function, its arguments and its result must pickle.

    When this process leaves the call without an answer, interrupted or killed, the other is interrupted, as by Ctrl-C, and
    ended `leave_s` seconds later if it still goes on (a local Ray takes up to 20 to end).

    Raises:
        LodesetError: the process was killed.
    """
    task = cloudpickle.dumps((function, arguments, leave_s))
    read, write = os.pipe()
    answers = os.fdopen(read, "rb")
    # Held back until the other process has imported what it needs and can end in words. It shares this one's session, so Ctrl-C
    # reaches both.
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        child = children.started("infra.apart", str(write), pass_fds=[write], session=False)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        os.close(write)
    try:
        with answers:
            children.send(child.stdin, task)
            answer = answers.read()
    finally:
        children.let_go(child)
        child.wait()
    if not answer:
        from lodeset.pipeline.dag.child import LOST_RAY  # loads pyarrow

        code = child.returncode
        how = f"was killed by signal {-code} (9: often for want of memory)" if code < 0 else f"ended with status {code}"
        if code == LOST_RAY:
            how = "lost the local Ray cluster (killed, or out of memory)"
        raise LodesetError(f"the process at work {how}; the same again goes on from what is finished")
    done, result = pickle.loads(answer)
    if not done:
        raise result
    return result  # type: ignore[no-any-return]


def main() -> None:
    """The other process."""
    left = threading.Event()
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as scripts start what they do not wait for
    leave_s = 60.0

    def interrupt(number: int, frame: FrameType | None) -> None:
        """Once: Ctrl-C reaches both processes, and what the first interrupt began to give back is not to be interrupted."""
        if left.is_set() or not ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt

    def leave() -> None:
        left.set()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(leave_s)
        os._exit(1)

    signal.signal(signal.SIGINT, interrupt)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        function, arguments, leave_s = cloudpickle.loads(children.received())
        children.when_asker_ends(leave)
        answer = cloudpickle.dumps((True, function(*arguments)))
    except BaseException as error:
        answer = _failure(error)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once told, the asking process lets go, and that is no interrupt
    with contextlib.suppress(OSError), os.fdopen(int(sys.argv[1]), "wb") as channel:
        channel.write(answer)
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


if __name__ == "__main__":
    main()
