"""A command that is stopped says so in one sentence, whenever that happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# Whoever runs the tests may ignore SIGINT, as what scripts start in the background does; that is inherited.
STARTED = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "sys.argv[0] = 'lodeset'; from lodeset.__main__ import main; main()"
)
SAID = "stopped; run the same command again to continue from what is finished"


def stopped(
    number: signal.Signals, ready: Callable[[], bool], *arguments: str, first: Path | None = None
) -> tuple[int, str, str]:
    """Status and output of a command that gets a signal when it is ready; `first` stands before all on the import path."""
    path = [*([str(first)] if first else []), *(p for p in sys.path if p)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", STARTED, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not ready():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.3)  # a signal between Python's last check and a system call that waits would be seen after it
            process.send_signal(number)
            told, said = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, told, said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_while_it_works(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """It waits for a configuration that nobody writes."""
    pipe = tmp_path / "lodeset.yaml"
    os.mkfifo(pipe)
    writers: list[int] = []

    def reads() -> bool:
        with contextlib.suppress(OSError):  # nobody has opened it for reading yet
            writers.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    try:
        status, told, said = stopped(number, reads, "plan", str(pipe), "--json")
    finally:
        for writer in writers:
            os.close(writer)
    assert (status, said.strip()) == (code, SAID)
    assert json.loads(told) == {"error": SAID, "exit_code": code}


@pytest.mark.parametrize(
    ("module", "number", "code"), [("typer", signal.SIGINT, 130), ("pydantic", signal.SIGTERM, 143)]
)
def test_while_it_is_imported(tmp_path: Path, module: str, number: signal.Signals, code: int) -> None:
    mark = tmp_path / "mark"
    (tmp_path / f"{module}.py").write_text(
        f"import pathlib, time\npathlib.Path({str(mark)!r}).touch()\ntime.sleep(60)\n"
    )
    assert stopped(number, mark.exists, "doctor", first=tmp_path) == (code, "", f"{SAID}\n")
