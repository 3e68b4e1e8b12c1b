"""`lodeset inspect` as people start and end it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from inline import in_one_process
from inspected_world import make

from lodeset.infra.cli.command import perform
from lodeset.infra.cli.main import app
from lodeset.infra.dashboard.making import THUMBNAILS, found
from lodeset.infra.dashboard.serving import listening
from lodeset.infra.session import open_store
from lodeset.pipeline.errors import LodesetError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "zoo.yaml"
    path.write_text("name: zoo\nstore: ./store\npool: [images/]\n")
    return path


def test_it_prints_its_address_and_ends_when_it_is_told(config: Path) -> None:
    command = [sys.executable, "-m", "lodeset", "inspect", str(config), "--no-open", "--base-path", "zoo"]
    environment = {**os.environ, "LODESET_DASHBOARD_TOKEN": "a-token-of-the-tests"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            assert address.endswith("/zoo/?token=a-token-of-the-tests")
            with urlopen(
                address.replace("/zoo/?token=a-token-of-the-tests", "/zoo/static/shell.js"), timeout=20
            ) as page:
                assert page.status == 200
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "the dashboard has ended" in out
    assert "Traceback" not in err


def test_only_this_machine_can_reach_it() -> None:
    with listening(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LodesetError, match=r"cannot listen on 127\.0\.0\.1:\d+ .*: choose another --port"):
            listening(taken.getsockname()[1])


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--run", "9"], 1, "9"),
        (["--base-path", "/a b"], 2, "--base-path /a b"),
        (["--port", "70000"], 2, "Invalid value for '--port'"),
    ],
)
def test_mistakes_are_told_before_anything_is_served(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    told: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["lodeset", "inspect", str(config), *options])
    assert perform(app) == code
    printed = capsys.readouterr()
    assert told in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""


def test_what_pages_read_is_made_without_a_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path, 60)
    for options, made in ((["--no-thumbnails"], False), ([], False)):  # there are no sources to make thumbnails from
        monkeypatch.setattr(sys, "argv", ["lodeset", "inspect", str(path), "--make-only", *options])
        with in_one_process():
            assert perform(app) == 0
        printed = capsys.readouterr()
        assert "68 images are ready for the dashboard" in printed.out
        assert ("there are no thumbnails" in printed.err) is (not options)
        inspected = found(open_store(path))
        assert inspected is not None and (THUMBNAILS in inspected.made) is made
