from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import held
import psutil
import pytest

from lodeset.infra.apart import apart
from lodeset.pipeline.errors import HeldError, LodesetError


def test_what_it_returns_and_raises() -> None:
    assert apart(held.pid) != os.getpid()
    with pytest.raises(HeldError, match="another run holds it"):
        apart(held.held)
    with pytest.raises(ZeroDivisionError, match="by nothing") as error:
        apart(held.broken)
    assert "in broken" in error.value.__notes__[0]
    with pytest.raises(LodesetError, match="was killed by signal 9"):
        apart(held.killed)


def test_what_does_not_pickle_is_told_in_words() -> None:
    with pytest.raises(RuntimeError, match="OfTwo: half of it") as error:
        apart(held.of_two)
    assert "in of_two" in error.value.__notes__[0]
    with pytest.raises(TypeError, match="lock"):
        apart(held.unpicklable)
    with pytest.raises(KeyboardInterrupt):  # leaving is no success
        apart(held.left)


@pytest.mark.parametrize("ended", ["kill -9", "kill", "kill -INT", "Ctrl-C"])
def test_it_does_not_outlive_who_asked(tmp_path: Path, ended: str) -> None:
    """Even where whoever asked can say nothing any more; what is held is given back, and nothing interrupts that."""
    number = {"kill -9": signal.SIGKILL, "kill": signal.SIGTERM}.get(ended, signal.SIGINT)
    with asked("hold", tmp_path, 60) as (asker, worker):
        if ended == "Ctrl-C":  # goes to both
            worker.send_signal(number)
        asker.send_signal(number)
        asker.wait(20)
        _until(lambda: _gone(worker))
        assert (tmp_path / "given-back").is_file()


def test_what_goes_on_is_ended(tmp_path: Path) -> None:
    with asked("stubborn", tmp_path, 1.0) as (asker, worker):
        asker.kill()
        asker.wait()
        time.sleep(0.5)
        assert not _gone(worker)
        _until(lambda: _gone(worker))


def test_what_a_script_starts_beside_itself_keeps_ignoring_its_interrupts(tmp_path: Path) -> None:
    with asked("hold", tmp_path, 60, ignored=True) as (asker, worker):
        worker.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert not _gone(worker) and not (tmp_path / "given-back").exists()
        asker.kill()
        asker.wait()
        _until(lambda: _gone(worker))
        assert (tmp_path / "given-back").is_file()


@contextlib.contextmanager
def asked(
    what: str, folder: Path, leave_s: float, ignored: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A process that waits for another, and that other one, at work."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    interrupts = "ignored" if ignored else "heeded"
    command = [sys.executable, held.__file__, what, str(folder), str(leave_s), interrupts]
    asker = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    worker = None
    try:
        _until((folder / "held").is_file)
        worker = psutil.Process(int((folder / "held").read_text()))
        assert worker.ppid() == asker.pid
        yield asker, worker
    finally:
        asker.kill()
        asker.wait()
        if worker is not None and not _gone(worker):
            worker.kill()


def _gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
