"""Rollback: an earlier run's artifacts count again, and the runs after it do not (decision 30)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lodeset.infra.gates.accepted import user
from lodeset.pipeline.dag.claims import claim, live
from lodeset.pipeline.dag.damage import missing, noted
from lodeset.pipeline.dag.manifests import Run
from lodeset.pipeline.dag.rollbacks import PUBLISHED, SOURCES, last_of, made_from, origin, rolling_back, standing
from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.dag.runs import Wanted, artifacts_of, record
from lodeset.pipeline.dag.stage import Stage
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import ConfigError, HeldError, LodesetError
from lodeset.pipeline.tables.forgotten import CLAIM, refuse_during_take_down

MISSING_SHOWN = 3


@dataclass(frozen=True)
class DataSet:
    """Which runs of a store belong together, and the configuration as its user calls it."""

    name: str
    limit: int | None
    config: str

    def __str__(self) -> str:
        return self.name if self.limit is None else f"{self.name} with --limit {self.limit}"


def roll_back(store: Store, data: DataSet, number: int, by: str | None = None, why: str = "") -> Run:
    """Makes the artifacts of an earlier run those that count, and returns the record of this.

    Raises:
        ConfigError: the run is not one of this data set.
        LodesetError: the run made no shards, is the one that counts already, or something that it made is gone.
        HeldError: a run or a take-down is working on the store.
    """
    refuse_during_take_down(store)
    with claim(store, CLAIM, f"a rollback in {store.url}"):
        others = [name for name in live(store) if name != CLAIM]
        if others:
            raise HeldError(f"a run is working on {store.url} ({', '.join(others)}): wait for it, or stop it")
        last = last_of(store, data.name, data.limit)
        if last is None:
            raise LodesetError(f"{store.url} has no finished run of {data}: there is nothing to roll back")
        to = origin(store, store.run(number))
        if (to.name, to.limit) != (data.name, data.limit):
            other = DataSet(to.name, to.limit, data.config)
            raise ConfigError(f"run {number} is one of {other}, and not of {data}: `lodeset status` shows the last run")
        if to.number == origin(store, last).number:
            raise LodesetError(f"run {to.number} is the one that counts already: nothing was changed")
        made = artifacts_of(store, to)
        _refuse_incomplete(store, to, made)
        wanted = Wanted(to.name, to.limit, to.until, to.config, tuple(to.stages))
        back = rolling_back(store, to, last, by or user(), why)
        return record(store, wanted, made, to.versions, to.began, to.ended, back)


def _refuse_incomplete(store: Store, run: Run, made: Mapping[str, Artifact]) -> None:
    if run.stages.get(f"{PUBLISHED}/all") is None:
        raise LodesetError(f"run {run.number} made no shards, so there is nothing to go back to: choose another run")
    gone = [f"the manifest of {id_}" for id_, one in run.stages.items() if one is not None and id_ not in made]
    files = {file.path: file for one in made.values() for file in one.files()}
    damaged = {damage.path: damage for damage in noted(store) if damage.path in files}
    damaged |= {damage.path: damage for damage in missing(store, files.values())}
    gone += [f"{path} ({damage.why})" for path, damage in sorted(damaged.items())]
    if gone:
        more = f", and {len(gone) - MISSING_SHOWN} more" if len(gone) > MISSING_SHOWN else ""
        raise LodesetError(
            f"run {run.number} cannot count again, because not all that it made is there: {', '.join(gone[:MISSING_SHOWN])}{more}. "
            "`compact --delete`, `gc` and `forget` remove files of earlier runs: roll back to a later run, or run again "
            "with the configuration of this one"
        )


# -- what runs after a rollback


def refusal(store: Store, data: DataSet, stages: Mapping[str, Stage], sources: Mapping[str, Artifact]) -> str | None:
    """Why a run is refused after a rollback: nothing has changed since a run that was rolled back. None if it is not, or while
    `sources` (finished stages that read sources, by id) does not tell."""
    back = standing(store, data.name, data.limit)
    number = back.made_from.get(made_from(stages, sources) or "") if back is not None else None
    if back is None or number is None:
        return None
    return (
        f"nothing that shards are made from has changed since run {number}, which was rolled back to run {back.to}: run {back.to} "
        f"remains the one that counts. Change the sources or the configuration of curation; `lodeset rollback {data.config} "
        f"{number}` makes run {number} count again, and `lodeset run {data.config} --fresh` starts anew"
    )


def refusing(
    store: Store, data: DataSet, stages: Mapping[str, Stage], watch: Callable[[Event], None]
) -> Callable[[Event], None]:
    """`watch`, which also ends the run as soon as its sources have been read and it turns out to repeat a run that was rolled back.

    The returned function raises HeldError. Records of runs are read only when sources have been read: damaged ones are withdrawn
    when a run begins.
    """
    sources: dict[str, Artifact] = {}

    def told(event: Event) -> None:
        watch(event)
        if event.stage.name in SOURCES and event.artifact is not None:
            sources[event.stage.id] = event.artifact
            why = refusal(store, data, stages, sources)
            if why is not None:
                raise HeldError(why)

    return told
