"""Runs as jobs of a real head: whatever happens on the way, each command ends with the right exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from builders import picture
from ray_head import Network, RayHead
from runs import SLOW_COMMIT

from lodeset.infra.jobs.client import Head
from lodeset.infra.jobs.follow import Waits, follow

pytestmark = pytest.mark.slow

LINES = 400
OUTCOMES: list[tuple[str, int, int, str]] = []  # for the table


@dataclass(frozen=True)
class Place:
    """A head, the network before it, and a folder for configurations."""

    head: RayHead
    network: Network
    folder: Path

    def config(self, name: str, images: int = 2, **keys: object) -> Path:
        folder = self.folder / name
        (folder / "pool").mkdir(parents=True)
        for number in range(images):
            (folder / "pool" / f"{number}.png").write_bytes(picture(number))
        path = folder / "lodeset.yaml"
        path.write_text(yaml.safe_dump({"name": name, "pool": [{"uri": "pool/"}], **keys}))
        return path

    def python(self, name: str, run: str) -> Path:
        """An interpreter for jobs that does `run`, in Python, instead of `lodeset run`; `real` starts the real one."""
        path = self.folder / f"python-{name}"
        path.write_text(
            f"#!{sys.executable}\nimport os, sys, time\n\n"
            "def real():\n    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n\n"
            "if 'lodeset.infra.jobs.arrived' in sys.argv:\n    real()\n"
            f"{run}\n"
        )
        path.chmod(0o700)
        return path

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = {"RAY_AUTH_TOKEN": self.head.token} if self.head.token is not None else {}
        return {**kept, **token, "HOME": str(self.folder), "RAY_API_SERVER_ADDRESS": self.network.address, **more}

    def started(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lodeset", *map(str, arguments)]
        return subprocess.Popen(
            command, env=self.environment(**environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def typed(self, *arguments: str | Path, code: int = 0, what: str = "", **environment: str) -> tuple[str, str]:
        return ended(self.started(*arguments, **environment), code, what)

    def until(self, done: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def status(self, job: str) -> str:
        return str(json.loads(self.typed("jobs", "logs", job, "--json")[0])["status"])


def ended(process: subprocess.Popen[str], code: int, what: str = "") -> tuple[str, str]:
    """What a command printed, which has to end with `code`; `what` happened to it goes into the table."""
    out, err = process.communicate(timeout=300)
    if what:
        lines = lines_of(err)
        twice = len(lines) - len(set(lines))
        shown = f"{len(set(lines))} of {LINES}, {twice} twice" if len(lines) > 1 and code == 7 else ""
        OUTCOMES.append((what, code, process.returncode, shown))
    assert "Traceback" not in out + err, err
    assert process.returncode == code, err
    return out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("jobs")
    # A lodeset that the nodes have already must not be the one that runs.
    (folder / "other" / "lodeset").mkdir(parents=True)
    (folder / "other" / "lodeset" / "__init__.py").write_text(
        "raise ImportError('the lodeset of the node was imported')"
    )
    head = RayHead({"PYTHONPATH": str(folder / "other")}, token=os.environ["RAY_AUTH_TOKEN"])
    with head, contextlib.closing(Network(head.port)) as network:
        yield Place(head, network, folder)
    print(f"\n| what happens | exit code due | exit code | lines of the log shown |\n{'| --- ' * 4}|")
    for row in OUTCOMES:
        print(f"| {' | '.join(map(str, row))} |")


def lines_of(err: str) -> list[int]:
    return [int(number) for number in re.findall(r"^line (\d+)$", err, re.MULTILINE)]


def counting(seconds: float, until: Path | None = None) -> str:
    """Numbers its lines, and exits with 7 once a file is there."""
    return f"""
for number in range({LINES}):
    print("line", number, flush=True)
    time.sleep({seconds} / {LINES})
while not os.path.exists({str(until or "/")!r}):
    time.sleep(0.1)
sys.exit(7)
"""


def test_a_run_is_sent_followed_and_done(place: Place) -> None:
    config = place.config("real", images=12, embed={"semantic": {"kind": "patch_dictionary"}})
    out, err = place.typed(
        "submit", config, "--until", "embed", "--set", "embed.semantic.words=64", "--json", what="a run ends"
    )
    assert json.loads(out)["exit_code"] == 0
    assert json.loads(out)["job"] == "real-1" and "done   embed/pool               12 -> 12" in err
    assert f"pool.0.uri {config.parent}/pool" in err  # the cluster has to see it
    artifacts = json.loads(place.typed("status", config, "--json")[0])["artifacts"]
    assert {one["stage"] for one in artifacts if one["finished"]} == {"ingest", "fit_embedder", "embed"}
    out, _ = place.typed("jobs", "list")
    assert re.search(r"real-1 +SUCCEEDED +0 ", out)


def test_a_log_stream_that_is_cut_three_times_and_an_exit_code_of_7(place: Place) -> None:
    config, end = place.config("cut"), place.folder / "cut-ends"
    process = place.started("submit", config, "--python", place.python("cut", counting(4, end)))
    for _ in range(3):
        place.until(lambda: place.network.cut(only_streams=True) > 0)
        time.sleep(1)
    end.touch()
    _, err = ended(process, 7, "the log stream is cut three times, the run exits 7")
    assert lines_of(err) == list(range(LINES))
    assert "cut-1 FAILED, exit code 7" in err
    assert lines_of(place.typed("jobs", "logs", "cut-1")[0]) == list(range(LINES))
    place.typed("jobs", "logs", "cut-1", "--follow", code=7, what="a job that has exited 7 is followed")


def test_a_head_out_of_sight_for_a_while(place: Place) -> None:
    config = place.config("unseen")
    process = place.started("submit", config, "--python", place.python("unseen", counting(4)))
    place.until(lambda: place.network.cut(only_streams=True) > 0)
    with place.network.cut_off():
        time.sleep(5)
    _, err = ended(process, 7, "the head cannot be reached for 5 s, the run exits 7")
    assert lines_of(err) == list(range(LINES))
    assert "says nothing about the job" in err and "answers again, after" in err


def test_a_run_that_is_stopped_keeps_its_parts_and_leaves_nothing_behind(place: Place) -> None:
    config = place.config("stopped", images=12, ingest={"slice_mb": 0.01})
    mark = f"stopped-{os.getpid()}"
    slow = (
        f"os.environ.update(LODESET_TEST_RUN={mark!r}, SLOW_COMMIT_SECONDS='0.5',"
        f" PYTHONPATH={str(SLOW_COMMIT)!r} + os.pathsep + os.environ['PYTHONPATH'])\nreal()"
    )
    process = place.started("submit", config, "--until", "embed", "--python", place.python("stopped", slow))
    store = config.parent / "runs"
    place.until(lambda: len(list(store.glob("parts/ingest/*/manifest.json"))) >= 2)
    out, told = place.typed("jobs", "stop", "stopped-1")
    assert out.split() == ["stopped-1", "STOPPED"] and "120 s to end in order" in told
    _, err = ended(process, 143, "the job is stopped")
    assert "stopped-1 STOPPED, exit code 143" in err and "stopped; run the same command again" in err
    parts = {path: path.stat().st_mtime_ns for path in store.glob("parts/ingest/*/manifest.json")}
    assert parts and not list(store.glob("claims/*.json"))
    assert not _marked(mark)
    # The next attempt goes on from there.
    _, err = place.typed("submit", config, "--until", "ingest")
    assert "submitted stopped-2" in err
    assert (
        parts.items() <= {path: path.stat().st_mtime_ns for path in store.glob("parts/ingest/*/manifest.json")}.items()
    )


def _marked(mark: str) -> list[str]:
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"LODESET_TEST_RUN={mark}".encode() in environ.read_bytes():
                found.append(environ.parent.name)
    return found


def test_an_interrupt_leaves_the_job_which_is_then_followed_and_not_doubled(place: Place) -> None:
    config, end = place.config("left"), place.folder / "left-ends"
    python = place.python("left", counting(2, end))
    process = place.started("submit", config, "--python", python)
    place.until(lambda: place.network.cut(only_streams=True) > 0)
    process.send_signal(signal.SIGINT)
    _, err = ended(process, 130, "Ctrl-C while following")
    assert "no longer following; the job goes on" in err and "lodeset jobs logs left-1 --follow" in err
    assert place.status("left-1") in ("PENDING", "RUNNING")
    process = place.started("submit", config, "--python", python)
    place.until(lambda: place.network.cut(only_streams=True) > 0)
    end.touch()
    _, err = ended(process, 7, "the same run is submitted again: its job, which exits 7, is followed")
    assert "left-1 is at work on this run already: nothing was submitted" in err
    assert lines_of(err) == list(range(LINES))
    assert [job for job in json.loads(place.typed("jobs", "list", "--json")[0])["jobs"] if job["name"] == "left"][
        1:
    ] == []


def test_without_the_right_token(place: Place) -> None:
    config = place.config("refused")
    _, err = place.typed("submit", config, code=1, what="no token (401)", RAY_AUTH_TOKEN="")
    assert "asks for a token, and there is none here: set RAY_AUTH_TOKEN" in err
    _, err = place.typed("jobs", "list", code=1, what="another token (403)", RAY_AUTH_TOKEN="0" * 32)
    assert "refuses the token of RAY_AUTH_TOKEN" in err and "0" * 32 not in err
    network = Network(1)
    network.close()
    _, err = place.typed("jobs", "list", "--address", network.address, code=1, what="nobody listens at the address")
    assert f"{network.address} does not answer (connection refused)" in err and "ssh -N -L" in err


def test_a_pending_job_is_told_what_it_lacks(place: Place) -> None:
    config = place.config("pending")
    out, _ = place.typed("submit", config, "--detach", "--driver-cpus", "64")
    assert out.split() == ["pending-1"]
    told: list[str] = []

    class Enough(Exception):
        pass

    def tell(text: str) -> None:
        told.append(text)
        raise Enough

    head = Head(f"http://127.0.0.1:{place.head.port}")
    with pytest.raises(Enough):
        follow(head, "pending-1", told.append, tell, Waits(poll=0.5, pending=1.0))
    assert "pending-1 has not begun for" in told[-1]
    assert "it asks for 64 CPU on one node, and the largest of 1 has 2 CPU" in told[-1]
    out, err = place.typed("jobs", "stop", "pending-1")
    assert out.split() == ["pending-1", "PENDING"] and "it will end then, without running" in err


def test_a_store_that_the_cluster_does_not_see(place: Place) -> None:
    """The job runs where its folder was moved away: as on a node that mounts nothing."""
    config = place.config("elsewhere")
    moving = "import shutil; shutil.rmtree(STORE); real()".replace("STORE", repr(str(config.parent / "runs")))
    python = place.python("elsewhere", "sys.exit('not reached')")
    python.write_text(python.read_text().replace("    real()\nsys", f"    {moving}\nsys"))
    _, err = place.typed("submit", config, "--python", python, code=2, what="the store is not the same on the cluster")
    assert "is not the one of the machine that submitted elsewhere-1" in err


def test_a_head_that_dies_and_comes_back_without_its_jobs_and_without_a_token(place: Place) -> None:
    """The last test: the head asks for no token from here on."""
    config = place.config("forgotten")
    process = place.started("submit", config, "--python", place.python("forgotten", counting(60)))
    place.until(lambda: place.network.cut(only_streams=True) > 0)
    place.head.kill()
    place.head.token = None
    place.head.start()
    _, err = ended(process, 1, "the head is killed and comes back, without its jobs and without a token")
    assert "no longer knows forgotten-1: the head was restarted" in err and "submit again" in err
    python = place.python("again", "print('line 0')")
    _, err = place.typed("submit", config, "--python", python, what="the same run is submitted to the new head")
    assert "submitted forgotten-2" in err and "forgotten-2 SUCCEEDED, exit code 0" in err
