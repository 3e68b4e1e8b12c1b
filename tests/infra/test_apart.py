from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import held
import psutil
import pytest

from infra.apart import apart
from pipeline.errors import HeldError, LodesetError


def test_what_it_returns_and_raises() -> None:
    assert apart(held.pid) != os.getpid()
    with pytest.raises(HeldError, match="another run holds it"):
        apart(held.held)
    with pytest.raises(ZeroDivisionError, match="by nothing") as error:
        apart(held.broken)
    assert "in broken" in error.value.__notes__[0]
    with pytest.raises(LodesetError, match="was killed by signal 9"):
        apart(held.killed)


@pytest.mark.parametrize("ended", ["kill -9", "kill", "kill -INT", "Ctrl-C"])
def test_it_does_not_outlive_who_asked(tmp_path: Path, ended: str) -> None:
    """Even where whoever asked can say nothing any more; what is held is given back, and nothing interrupts that."""
    number = {"kill -9": signal.SIGKILL, "kill": signal.SIGTERM}.get(ended, signal.SIGINT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    asker = subprocess.Popen([sys.executable, held.__file__, tmp_path], env=environment, stderr=subprocess.DEVNULL)
    try:
        _until(lambda: (tmp_path / "held").is_file())
        worker = psutil.Process(int((tmp_path / "held").read_text()))
        assert worker.ppid() == asker.pid
        if ended == "Ctrl-C":  # goes to both
            worker.send_signal(number)
        asker.send_signal(number)
        asker.wait(20)
        _until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
        assert (tmp_path / "given-back").is_file()
    finally:
        asker.kill()
        asker.wait()


def _until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
