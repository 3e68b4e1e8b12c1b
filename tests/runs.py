"""Runs of the command line as a user starts them, and what can be asked about the processes and the store they leave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import psutil

SLOW_COMMIT = Path(__file__).parent / "slow_commit"
MARK = "LODESET_TEST_RUN"
_FORKED = "multiprocessing.forkserver"

Worker = Literal["pool", "ray", "training", "node"]


@dataclass
class Run:
    """One command of `lodeset` in a session of its own, whose processes all carry a mark."""

    arguments: tuple[str | Path, ...]
    slow_commit_s: float = 0.0
    slow_stages: tuple[str, ...] = ()  # whose parts are slow; every stage's without a name
    environment: Mapping[str, str] | None = None  # instead of that of the tests
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Run:
        slow = {"SLOW_COMMIT_SECONDS": str(self.slow_commit_s), "SLOW_COMMIT_STAGES": " ".join(self.slow_stages)}
        environment = {**(self.environment or os.environ), MARK: self.mark, **slow}
        environment["PYTHONPATH"] = str(SLOW_COMMIT)
        command = [sys.executable, "-m", "lodeset", *map(str, self.arguments)]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        return self

    def __enter__(self) -> Run:
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Ends what a failed check left running, so that the tests after it find the store and the machine free."""
        for process in self.processes():
            process.kill()
        if self.process is not None and self.process.returncode is None:
            self.process.communicate()

    def wait(self, timeout_s: float = 300) -> tuple[int, str]:
        assert self.process is not None
        _, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, err.decode()

    def processes(self) -> list[psutil.Process]:
        """Everything alive that this run started, directly or not."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill_driver(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)

    def kill_worker(self, kind: Worker) -> bool:
        """Kills one worker that is at work, or the process that stands for a whole Ray node; whether there was one."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                command, parent = " ".join(process.cmdline()), process.parent()
                actor = "Actor" in command or "Train" in command
                found = {
                    # Workers of lodeset's own pool are forked from a server.
                    "pool": _FORKED in command and parent is not None and _FORKED in " ".join(parent.cmdline()),
                    "ray": command.startswith("ray::") and not command.startswith("ray::IDLE") and not actor,
                    "training": "RayTrainWorker" in command,
                    "node": process.name() == "raylet",
                }
                if found[kind]:
                    process.kill()
                    return True
        return False

    def listening(self) -> set[tuple[str, str]]:
        """(address, name of the process) of every socket on which something of this run listens for TCP connections."""
        mine = {process.pid: process for process in self.processes()}
        found = set()
        for socket in psutil.net_connections("tcp"):
            if socket.status == psutil.CONN_LISTEN and socket.pid in mine:
                with contextlib.suppress(psutil.Error):
                    found.add((socket.laddr.ip, mine[socket.pid].name()))
        return found

    def gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.processes():
                return True
            time.sleep(0.2)
        return False


@dataclass(frozen=True)
class WholeRun:
    """What was left of a run of the demo, from ingest to pruning, that nobody disturbed."""

    CHECKPOINT_EVERY: ClassVar[int] = 1  # steps
    folder: Path
    heard: frozenset[tuple[str, str]]  # what it listened on: address, name of the process

    @property
    def config(self) -> Path:
        return self.folder / "lodeset.yaml"

    @property
    def store(self) -> Path:
        return self.folder / "runs"


def part_manifests(store: Path, stage: str) -> dict[str, tuple[int, str]]:
    """Committed parts of a stage: when their manifest and files were written, and the digest of it all."""
    found = {}
    for manifest in sorted((store / "parts" / stage).glob("*/manifest.json")):
        tree = json.loads(manifest.read_text())
        digest = hashlib.sha256(manifest.read_bytes())
        times = [manifest.stat().st_mtime_ns]
        for file in tree["files"].values():
            path = store / file["path"]
            digest.update(path.read_bytes())
            times.append(path.stat().st_mtime_ns)
        found[manifest.parent.name] = (max(times), digest.hexdigest())
    return found


def shard_digests(store: Path) -> dict[str, str]:
    """SHA-256 of every shard and of the index, by name."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted((store / "shards").glob("*/*"))
        if p.suffix in (".tar", ".parquet")
    }
