"""What the images of `docker/` do, as far as it goes without a container engine: every install step in a clean virtual
environment, and the commands and health checks of the services against a real head of Ray.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfiles import FILES, ROOT, stages

pytestmark = pytest.mark.slow

CPU = stages(FILES["cpu"])


def test_every_install_step_works_in_a_clean_environment(tmp_path: Path) -> None:
    """The steps of the image for CPUs, in their order and as written; torch comes from the index of this machine."""
    build, final = CPU
    folder, python = tmp_path / "build", tmp_path / "usr"
    venv.create(python, with_pip=True)
    folder.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))},
        **build.arguments,
        "TORCH_INDEX": os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple"),
        "PATH": f"{python}/bin:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache/pip")),
        "PIP_NO_COMPILE": "1",  # as in the image, but for half a minute
    }

    def run(step: str) -> str:
        done = subprocess.run(
            ["/bin/sh", "-ec", step], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, f"{step}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    ran = 0
    for kind, text in build.instructions:
        if kind == "COPY":
            *sources, to = text.split()
            for source in sources:
                copy(ROOT / source, folder / to, whole=to != "./")
        elif kind == "RUN":
            run(text)
            ran += 1
    assert ran == 3
    # What the last stage tries of what it copied.
    (made,) = [step for step in final.of("RUN") if "useradd" in step]
    tried = [step for step in made.split(" && ") if "lodeset --version" in step or "python -c" in step]
    assert len(tried) == 2
    for step in tried:
        run(step)
    # Nothing is found but what was copied: the package runs from the environment, far from the sources.
    shutil.rmtree(folder / "lodeset")
    told = run(
        "cd / && python -P -c 'import lodeset, lodeset.infra.cli.main as m; print(lodeset.__file__, m.__file__)'"
    )
    assert all(place.startswith(f"{python}/lib") for place in told.split())
    (tmp_path / "a.yaml").write_text("pool: [/nowhere/]\n")
    assert "OnCalendar" in run(f"lodeset schedule {tmp_path}/a.yaml --cron '0 3 * * 1' --as systemd")


def copy(source: Path, to: Path, *, whole: bool) -> None:
    """As `COPY` does; links stay links."""
    if source.is_dir():
        shutil.copytree(source, to, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, to if whole else to / source.name)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def service(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"][name])


def check(name: str, port: int) -> subprocess.CompletedProcess[str]:
    *_, code = service(name)["healthcheck"]["test"]
    code = re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path: Ray's Unix sockets lie in it."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="ls-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_the_head_starts_asks_for_its_token_and_is_found_healthy(home: Path) -> None:
    """The service's own command, on other ports and on loopback only; nothing outside the home folder is written."""
    gcs, dashboard, agent, client = free_ports(4)
    (home / "token").write_text(secrets.token_hex(32))
    (home / "token").chmod(0o400)
    changed = {"--port=6379": f"--port={gcs}", "--dashboard-port=8265": f"--dashboard-port={dashboard}"}
    changed["--dashboard-host=0.0.0.0"] = "--dashboard-host=127.0.0.1"
    given = service("head")["environment"]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **given,
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # only loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": str(home),
    }
    command = [changed.get(word, word) for word in service("head")["command"]]
    assert set(changed.values()) <= set(command)
    extra = [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--num-cpus=1"]
    extra += [f"--temp-dir={home}/r", "--node-ip-address=127.0.0.1"]
    assert check("head", dashboard).returncode != 0 and check("worker", agent).returncode != 0
    with open(home / "log", "wb") as log:
        ray = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *command, *extra],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while check("head", dashboard).returncode or check("worker", agent).returncode:
            assert ray.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.5)
        listed = f"http://127.0.0.1:{dashboard}/api/jobs/"
        assert status_of(listed, None) == 401
        assert status_of(listed, "wrong") == 403
        assert status_of(listed, (home / "token").read_text()) == 200
    finally:
        ray.send_signal(signal.SIGTERM)  # as `docker stop` does
        try:
            ray.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ray.pid, signal.SIGKILL)
    assert check("head", dashboard).returncode != 0 and check("worker", agent).returncode != 0
    assert not (home / ".ray").exists()


def status_of(url: str, token: str | None) -> int:
    import urllib.error
    import urllib.request

    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
