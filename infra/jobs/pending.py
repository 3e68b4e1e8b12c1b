"""What a job that does not begin is waiting for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Asked:
    """What the driver of a job asks for on one node, beside what its stages ask for later."""

    cpus: float = 0.0
    memory_gb: float = 0.0

    def in_ray_terms(self) -> dict[str, float]:
        """Amounts by Ray's names; only what is asked for."""
        amounts = {"CPU": self.cpus, "memory": self.memory_gb * GIB}
        return {name: amount for name, amount in amounts.items() if amount}


def lacking(asked: Asked, status: Mapping[str, Any]) -> str:
    """Why the driver of a job is not running, from what was asked and what `/api/cluster_status` tells."""
    cluster = status.get("clusterStatus") or {}
    nodes = list(((cluster.get("loadMetricsReport") or {}).get("usageByNode") or {}).values())
    coming = _coming((cluster.get("autoscalerReport") or {}), status.get("autoscalingError"))
    if not nodes:
        return f"the head reports no node{coming}"
    wanted = asked.in_ray_terms()
    for name, amount in wanted.items():
        largest = max(_total(node, name) for node in nodes)
        if largest < amount:
            return (
                f"it asks for {_said(name, amount)} on one node, and the largest of {len(nodes)} has "
                f"{_said(name, largest)}: add a larger node, or ask for less{coming}"
            )
    if not any(all(_free(node, name) >= amount for name, amount in wanted.items()) for node in nodes):
        asks = " and ".join(_said(name, amount) for name, amount in wanted.items())
        free = "; ".join(", ".join(_said(name, _free(node, name)) for name in wanted) for node in nodes[:8])
        return f"it waits for {asks} on one node; free on {len(nodes)} nodes: {free}{coming}"
    return (
        "the cluster has what it asks for; its node may still be setting up its environment (see "
        f"runtime_env_setup-*.log among the logs of the head){coming}"
    )


def _coming(report: Mapping[str, Any], error: object) -> str:
    starting = len(report.get("pendingNodes") or ()) + sum((report.get("pendingLaunches") or {}).values())
    said = f"; {starting} more nodes are being started" if starting else ""
    failed = report.get("failedNodes") or ()
    said += f"; {len(failed)} nodes failed to start" if failed else ""
    return said + (f"; the autoscaler says: {error}" if error else "")


def _total(node: Mapping[str, Any], name: str) -> float:
    return float(node.get(name, (0.0, 0.0))[1])


def _free(node: Mapping[str, Any], name: str) -> float:
    used, total = node.get(name, (0.0, 0.0))
    return float(total) - float(used)


def _said(name: str, amount: float) -> str:
    return f"{amount / GIB:.1f} GiB of memory" if name == "memory" else f"{amount:g} {name}"
