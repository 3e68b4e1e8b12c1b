"""The head of a Ray cluster of its own, on the loopback interface, and a network before it that can fail."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

START_S = 120.0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class RayHead:
    """`ray start --head` with a home and a folder of its own. `token` is None where it asks for none."""

    environment: Mapping[str, str] = field(default_factory=dict)
    cpus: int = 2
    token: str | None = field(default_factory=lambda: secrets.token_hex(16))
    ports: list[int] = field(default_factory=lambda: free_ports(4))
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="lodeset-head-", dir="/tmp")))
    process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """Of the dashboard."""
        return self.ports[1]

    def start(self) -> RayHead:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        auth = (
            {"RAY_AUTH_MODE": "disabled"}
            if self.token is None
            else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        )
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "LODESET_"))}
        environment = {
            **inherited,
            **self.environment,
            **auth,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: the node is 127.0.0.1
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        gcs, dashboard, agent, client = self.ports
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", f"--num-cpus={self.cpus}",
            "--object-store-memory=100000000", f"--temp-dir={self.folder}/t", "--disable-usage-stats",
        ]  # fmt: skip
        with open(self.folder / "head.log", "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_S
        while not self._takes_jobs():
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "head.log").read_text()
            time.sleep(0.2)
        return self

    def _takes_jobs(self) -> bool:
        """Whether its dashboard and the agent that starts jobs answer."""
        for port, path in ((self.port, "/api/jobs/"), (self.ports[2], "/api/local_raylet_healthz")):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
            if self.token is not None:
                request.add_header("Authorization", f"Bearer {self.token}")
            try:
                urllib.request.urlopen(request, timeout=5).close()
            except (urllib.error.URLError, OSError):
                return False
        return True

    def kill(self) -> None:
        """kill -9 of everything that it started."""
        if self.process is None:
            return
        with contextlib.suppress(psutil.Error):
            mine = psutil.Process(self.process.pid)
            everything = [mine, *mine.children(recursive=True)]
            for process in everything:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(everything[1:], timeout=10)
        self.process.wait()
        self.process = None

    def __enter__(self) -> RayHead:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Network:
    """Passes connections on to a port of this machine. Streams can be cut, and everything can be."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.down = False
        self._lock = threading.Lock()
        self._pairs: list[tuple[bool, socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, only_streams: bool = False) -> int:
        """Ends the connections that are open, and returns how many there were."""
        with self._lock:
            ended = [pair for pair in self._pairs if pair[0] or not only_streams]
            self._pairs = [pair for pair in self._pairs if pair not in ended]
        for _, one, other in ended:
            _end(one)
            _end(other)
        return len(ended)

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """No connection while the block runs."""
        self.down = True
        self.cut()
        try:
            yield
        finally:
            self.down = False

    def close(self) -> None:
        _end(self._listening)
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                theirs, _ = self._listening.accept()
                if self.down:
                    _end(theirs)
                else:
                    threading.Thread(target=self._join, args=(theirs,), daemon=True).start()

    def _join(self, theirs: socket.socket) -> None:
        try:
            begun = theirs.recv(65536)
            ours = socket.create_connection(("127.0.0.1", self._to))
        except OSError:
            _end(theirs)
            return
        pair = (b"/logs/tail" in begun, theirs, ours)
        with self._lock:
            self._pairs.append(pair)
        with contextlib.suppress(OSError):
            ours.sendall(begun)
        other_way = threading.Thread(target=_pass_on, args=(ours, theirs), daemon=True)
        other_way.start()
        _pass_on(theirs, ours)
        other_way.join()
        with self._lock, contextlib.suppress(ValueError):
            self._pairs.remove(pair)
        theirs.close()
        ours.close()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        one.close()
