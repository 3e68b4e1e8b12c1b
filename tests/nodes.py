"""A Ray cluster of three nodes on this machine, whose nodes can be killed, frozen and replaced."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

# Alone in its process: Ray keeps the state of a cluster in globals.
HOST = """
import sys
from ray.cluster_utils import Cluster
sizes = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=sizes)
nodes = [cluster.add_node(**sizes) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "kill\\n":
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
    elif line == "add\\n":
        nodes.append(cluster.add_node(wait=True, **sizes))
    elif line == "pids\\n":
        pass
    print(nodes[0].all_processes["raylet"][0].process.pid, flush=True)
cluster.shutdown()
"""


@dataclass
class Nodes:
    """A head and two nodes, of one core each."""

    address: str
    environment: dict[str, str]
    _commands: IO[str]
    _answers: IO[str]

    def _ask(self, command: str) -> int:
        self._commands.write(f"{command}\n")
        self._commands.flush()
        return int(self._answers.readline())

    def kill(self) -> None:
        """Kills the older of the nodes that are not the head, with all its workers."""
        self._ask("kill")

    def add(self) -> None:
        """Adds a node in place of one that was killed."""
        self._ask("add")

    def freeze(self) -> list[psutil.Process]:
        """Stops every process of the older node, as of a machine that has lost its network, and returns them."""
        raylet = psutil.Process(self._ask("pids"))
        frozen = [raylet, *raylet.children(recursive=True)]
        for process in frozen:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        return frozen


@contextlib.contextmanager
def three_nodes(home: Path) -> Iterator[Nodes]:
    """The cluster lives as long as the block; `home` takes what Ray leaves in a home folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: everything on loopback
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_enable_metrics_collection": "0",
    }
    with subprocess.Popen(
        [sys.executable, "-c", HOST],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
        start_new_session=True,
    ) as host:
        assert host.stdin is not None and host.stdout is not None
        try:
            address = next(line.strip() for line in host.stdout if line[:1].isdigit())
            yield Nodes(address, environment, host.stdin, host.stdout)
        finally:
            mine = psutil.Process(host.pid).children(recursive=True)
            with contextlib.suppress(BrokenPipeError):
                host.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.wait(timeout=20)
            for process in mine:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            host.kill()
