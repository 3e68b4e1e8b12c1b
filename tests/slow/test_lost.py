"""What waits for an engine that is gone does not wait for ever."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from lodeset.pipeline.dag.child import LOST_RAY

pytestmark = pytest.mark.slow

# At the right address (Ray would ask at this machine's outside one) with another token.
_STRANGER = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
WORK = """
import os, sys, time
from lodeset.pipeline.dag.cluster import LOCAL
from lodeset.pipeline.engines import ray
ray._NOTICE_S = 2.0
def nap(seconds):
    time.sleep(seconds)
    return seconds
with ray.cluster(LOCAL, 2) as joined:
    print(os.environ[ray._HOST].split()[0], os.environ[ray.SCRATCH], flush=True)
    done = ray.map_items(nap, [0.1, 600, 600], cpus=2, address=joined.address)
    print(next(done), flush=True)
    list(done)
"""


@pytest.mark.parametrize("victim", ["host", "gcs_server", "raylet"])
def test_a_cluster_that_is_killed_ends_what_waits_for_it(victim: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            pid, folder = process.stdout.readline().split()
            assert Path(folder).stat().st_mode & 0o777 == 0o700
            assert process.stdout.readline().strip() == "0.1"
            host = psutil.Process(int(pid))
            target = host if victim == "host" else next(p for p in host.children() if p.name() == victim)
            started = time.monotonic()
            target.send_signal(signal.SIGKILL)
            code = process.wait(timeout=60)
            err = process.stderr.read()
        finally:
            process.kill()
    assert code in (1, LOST_RAY), err
    assert code == 1 or "the local Ray cluster is gone" in err
    assert time.monotonic() - started < 60
    assert not Path(folder).exists()


def test_services_answer_nobody_without_the_token() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline(), process.stdout.readline()
            everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            ports = {
                (one.name(), socket.laddr.port)
                for one in everything
                for socket in one.net_connections("tcp")
                if socket.status == psutil.CONN_LISTEN
            }
            assert any(name == "gcs_server" for name, _ in ports)
            for name, port in ports:
                for path in ("", "metrics", "logs/", "api/jobs/", "nodes"):
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5)
                        raise AssertionError(f"{name} on {port} gives /{path}: {answer.read(200)!r}")
            gcs = next(port for name, port in ports if name == "gcs_server")
            stranger = f"import ray; ray.init(address='127.0.0.1:{gcs}'); print('in', ray.nodes())"
            tried = subprocess.run(
                [sys.executable, "-c", stranger],
                env={**environment, **_STRANGER},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert tried.returncode != 0 and "in [" not in tried.stdout, tried.stdout
        finally:
            process.terminate()


def test_folders_of_killed_runs_are_cleared_by_the_next() -> None:
    """Killed together with the host of its cluster, a run can remove nothing."""
    from lodeset.pipeline.engines import ray

    folder = Path(ray._parent()) / f"{ray._PREFIX}of-a-killed-run"
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / ray._LOCK).touch()
    ray._clear_abandoned()
    assert not folder.exists()
