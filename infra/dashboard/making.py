"""Make a run ready to be looked at, and find what was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lodeset.infra.config import cpus_of
from lodeset.infra.looking import looking
from lodeset.infra.looking.held import Held
from lodeset.infra.session import Opened, cluster_of, run_in
from lodeset.pipeline.dag.decisions import decide
from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.dag.stage import Stage
from lodeset.pipeline.dag.store import Artifact
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.stages.inspect.graph import stages

INSPECT, THUMBNAILS = "inspect/all", "thumbnails/all"


@dataclass(frozen=True)
class Inspected:
    """A run, and the artifacts that pages about it read: `made` holds `inspect/all`, `thumbnails/all` and `fit_map/pool`."""

    held: Held
    made: Mapping[str, Artifact]

    @property
    def artifact(self) -> Artifact:
        return self.made[INSPECT]


def inspect(
    opened: Opened, watch: Callable[[Event], None], run: int | None = None, thumbnails: bool = True
) -> Inspected:
    """Makes what is missing, for the last finished run or the one with this number.

    Raises:
        LodesetError: no run has ingested anything, or a source of thumbnails is gone.
        HeldError: another process is making it.
    """
    held = looking.held(opened, run)
    wanted = _wanted(opened, held, thumbnails)
    made = run_in(
        opened.store,
        wanted,
        name=f"{opened.config.name}.inspect",
        limit=opened.config.ingest.limit,
        cpus=cpus_of(opened.config),
        ray=cluster_of(opened.config.resources.cluster),
        watch=watch,
        given=held.artifacts,
    )
    return Inspected(held, {id_: made[id_] for id_ in wanted})


def found(opened: Opened, run: int | None = None) -> Inspected | None:
    """What was made before, or None where something is missing. Thumbnails may be."""
    held = looking.held(opened, run)
    for thumbnails in (True, False):
        wanted = _wanted(opened, held, thumbnails)
        done = {id_: d.artifact for id_, d in decide(opened.store, wanted, given=held.artifacts).items()}
        made = {id_: artifact for id_ in wanted if (artifact := done[id_]) is not None}
        if len(made) == len(wanted):
            return Inspected(held, made)
    return None


def _wanted(opened: Opened, held: Held, thumbnails: bool) -> dict[str, Stage]:
    wanted = stages(held.artifacts, thumbnails, opened.config.inspect.map)
    if not wanted:
        raise LodesetError(f"no finished run of {opened.path} has ingested the pool: `lodeset run` first")
    return wanted
