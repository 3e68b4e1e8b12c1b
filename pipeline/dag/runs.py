"""Runs that finished: what each made or found made, so that a store can be understood when sources and configuration have moved on.

A record is put if absent under the next number, so the numbers are the order in which runs finished, whatever clocks say. A run that
finds everything as the last one left it records nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lodeset.pipeline.dag.manifests import Artifact, Made, RolledBack, Run, sealed
from lodeset.pipeline.dag.stage import PREVIOUS
from lodeset.pipeline.dag.store import Store, run_path


@dataclass(frozen=True)
class Wanted:
    """What a run was asked for: the configuration, and every stage of it by id, in the order of the DAG."""

    name: str
    limit: int | None
    until: str
    config: Mapping[str, Any]
    stages: tuple[str, ...]


def newest_first(store: Store, name: str) -> Iterator[Run]:
    """The runs of one name that finished, the last one first."""
    for number in reversed(store.run_numbers()):
        run = store.run(number)
        if run.name == name:
            yield run


def record(
    store: Store,
    wanted: Wanted,
    made: Mapping[str, Artifact],
    versions: Mapping[str, str],
    began: float,
    ended: float,
    rolled_back: RolledBack | None = None,
) -> Run:
    """Keeps what a run made, and returns the record; that of the last run, where this one changed nothing."""
    last = next((run for run in newest_first(store, wanted.name) if run.limit == wanted.limit), None)
    stages = {id_: _placed(store, made[id_]) if id_ in made else None for id_ in wanted.stages}
    if last and (last.until, last.config, last.stages) == (wanted.until, wanted.config, stages):
        return last
    before = last.number if last is not None else None
    told = (wanted.name, wanted.limit, wanted.until, wanted.config, stages, versions, began, ended)
    while True:
        number = 1 + max(store.run_numbers(), default=0)
        run = Run(number, before, *told, rolled_back)
        if store.put_absent(run_path(number), sealed(asdict(run))):
            return run


def _placed(store: Store, artifact: Artifact) -> Made:
    """The artifact as the newest of its stage and set, which the last run used by definition."""
    history = store.history(artifact.stage, artifact.set)
    order = max(artifact.order, store.last_used(artifact.id).get(artifact.fingerprint, 0))
    newest = bool(history) and history[0].fingerprint == artifact.fingerprint
    return Made(artifact.fingerprint, order if newest and order else store.next_order(artifact.stage, artifact.set))


def artifacts_of(store: Store, run: Run) -> dict[str, Artifact]:
    """What a run left of its stages, by id; those whose artifacts are gone since are left out."""
    found = {}
    for id_, made in run.stages.items():
        stage, _, set_ = id_.partition("/")
        artifact = store.artifact(stage, set_, made.fingerprint) if made is not None else None
        if artifact is not None:
            found[id_] = artifact
    return found


def without_records(store: Store) -> dict[str, Artifact]:
    """The artifacts that belong together in a store that has no record of a run (those of lodeset 0.1.0): what the newest was made
    from, and the newest others that fit; each after what it was made from."""
    newest = [
        one
        for stage in store.names("artifacts")
        for set_ in store.names(f"artifacts/{stage}")
        for one in store.history(stage, set_)[:1]
    ]
    newest.sort(key=lambda one: (-one.created, one.id))
    found: dict[str, Artifact] = {}
    for one in newest:
        together: dict[str, Artifact] = {}
        _gather(store, one, together)
        if all(found.get(id_, artifact).fingerprint == artifact.fingerprint for id_, artifact in together.items()):
            found |= together
    return _in_order(found)


def _gather(store: Store, artifact: Artifact, found: dict[str, Artifact]) -> None:
    """Adds an artifact and all that it was made from, as far as it is there; what it went on from is no part of it."""
    found[artifact.id] = artifact
    for role, told in artifact.inputs.items():
        stage, _, set_ = told.get("stage", "").partition("/")
        if role == PREVIOUS or told.get("stage") in found:
            continue
        needed = store.artifact(stage, set_, told.get("fingerprint", ""))
        if needed is not None:
            _gather(store, needed, found)


def _in_order(found: Mapping[str, Artifact]) -> dict[str, Artifact]:
    ordered: dict[str, Artifact] = {}

    def visit(one: Artifact) -> None:
        if one.id in ordered:
            return
        for told in one.inputs.values():
            needed = found.get(told.get("stage", ""))
            if needed is not None and needed.id != one.id:
                visit(needed)
        ordered[one.id] = one

    for one in sorted(found.values(), key=lambda one: (one.created, one.id)):
        visit(one)
    return ordered
