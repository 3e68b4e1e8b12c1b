"""What the runner knows of a Ray cluster, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OBJECT_STORE_BYTES = 256 * 2**20
# Work of a stage that takes a core no longer than this is done in the stage's own process: starting Ray and its workers takes
# 10 to 15 s of a core.
IN_PLACE_S = 12.0


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster to start or to join, and how; see `pipeline.config.RayCluster`."""

    address: str = "local"
    cpus: int | None = None
    wait_for_nodes: float = 60.0
    namespace: str | None = None
    env: tuple[str, ...] = ()
    object_store_bytes: int = OBJECT_STORE_BYTES
    in_place_s: float = IN_PLACE_S
    placement: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def local(self) -> bool:
        return self.address == "local"

    def of_stage(self, name: str) -> dict[str, Any]:
        """What the process of a stage needs to know of it; JSON."""
        return {
            "wait_for_nodes": self.wait_for_nodes,
            "namespace": self.namespace,
            "env": list(self.env),
            "placement": dict(self.placement.get(name, {})),
            "in_place_s": self.in_place_s if self.local else 0.0,
        }


@dataclass(frozen=True)
class Joined:
    """A cluster that answers, and the cores that stages may use on it together."""

    address: str
    cpus: int
    environment: Mapping[str, str] = field(default_factory=dict)  # what processes need to join it


# The address of a local cluster that is started when a stage asks for it: small stages do without.
ON_DEMAND = "on demand"
LOCAL = Cluster()

# Ray's errors about a worker or a node that is gone, in any chain of causes.
_GONE = frozenset(
    {
        "ActorDiedError",
        "ActorUnavailableError",
        "LocalRayletDiedError",
        "NodeDiedError",
        "ObjectFetchTimedOutError",
        "ObjectLostError",
        "ObjectReconstructionFailedError",
        "OwnerDiedError",
        "RayActorError",
        "ReferenceCountingAssertionError",
        "WorkerCrashedError",
    }
)


def lost_a_worker(error: BaseException) -> bool:
    """Whether an error says that a worker or a node of Ray is gone: what it did can be done again elsewhere."""
    seen: BaseException | None = error
    while seen is not None:
        if any(kind.__name__ in _GONE for kind in type(seen).__mro__):
            return True
        seen = getattr(seen, "cause", None) or seen.__cause__
    return False
