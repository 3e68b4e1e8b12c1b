"""What a rollback means for the runs after it.

A rollback is a record like that of a run, and repeats the artifacts of an earlier run as the newest of their stages. So whatever
reads or continues from the last run gets these. Two more rules keep the next run from undoing it (decision 30):

- A stage that continues from its own last artifact takes none from a run that was rolled back, unless it would make exactly that
  one again.
- A run over the same sources with the same configuration as one that was rolled back is refused (`made_from`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lodeset.pipeline.dag.fingerprint import canonical, digest
from lodeset.pipeline.dag.manifests import Artifact, RolledBack, Run
from lodeset.pipeline.dag.runs import artifacts_of, newest_first
from lodeset.pipeline.dag.stage import Stage, closure
from lodeset.pipeline.dag.store import Store

PUBLISHED = "write_shards"  # what a rollback is about: the shards, and all that they are made from
# The stages that list bytes and where they lie: what they found counts, and not where.
SOURCES = ("ingest", "blur_faces")


def withdrawn(store: Store, id_: str) -> frozenset[str]:
    """Fingerprints of a stage's artifacts that were rolled back, and that no run has used since."""
    found: set[str] = set()
    for number in store.run_numbers():
        run = store.run(number)
        if run.rolled_back is not None:
            found.update(run.rolled_back.artifacts.get(id_, ()))
        made = run.stages.get(id_)
        if made is not None:
            found.discard(made.fingerprint)
    return frozenset(found)


def last_of(store: Store, name: str, limit: int | None) -> Run | None:
    """The last record of a data set."""
    return next((run for run in newest_first(store, name) if run.limit == limit), None)


def origin(store: Store, run: Run) -> Run:
    """The run that a rollback repeats; every other run itself, and a rollback to a run whose record was deleted since."""
    numbers = store.run_numbers()
    while run.rolled_back is not None and run.rolled_back.to in numbers:
        run = store.run(run.rolled_back.to)
    return run


def standing(store: Store, name: str, limit: int | None) -> RolledBack | None:
    """The last rollback of a data set, as long as nothing but its shards was published since. Compaction publishes the same ones,
    and a run that stops before the shards publishes none."""
    later: list[Run] = []
    for run in newest_first(store, name):
        if run.limit != limit:
            continue
        if run.rolled_back is not None:
            own = of_run(store, run)
            return run.rolled_back if all(of_run(store, one) == own for one in later) else None
        if run.stages.get(f"{PUBLISHED}/all") is not None:
            later.append(run)
    return None


def rolling_back(store: Store, to: Run, last: Run, by: str, why: str) -> RolledBack:
    """What the record of a rollback from the last run says."""
    after = [run for run in newest_first(store, to.name) if run.limit == to.limit and to.number < run.number]
    gone = [run for run in reversed(after) if run.number <= last.number]
    kept = {
        (id_, made.fingerprint)
        for run in newest_first(store, to.name)
        if run.limit == to.limit and run.number <= to.number
        for id_, made in run.stages.items()
        if made is not None
    }
    artifacts: dict[str, list[str]] = {}
    for id_ in to.stages:
        for one in _made_since(store, id_, to, gone):
            if (id_, one) not in kept:
                artifacts.setdefault(id_, []).append(one)
    digests = ((of_run(store, run), run.number) for run in gone if run.rolled_back is None)
    return RolledBack(
        to=to.number,
        runs=tuple(run.number for run in gone),
        artifacts={id_: tuple(sorted(found)) for id_, found in artifacts.items()},
        made_from={one: number for one, number in digests if one is not None},
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        by=by,
        why=why,
    )


def _made_since(store: Store, id_: str, to: Run, gone: list[Run]) -> set[str]:
    """What later runs used of a stage that continues from itself, and what runs that failed left of it."""
    made = to.stages[id_]
    recorded = {run.stages[id_].fingerprint for run in gone if run.stages.get(id_) is not None}  # type: ignore[union-attr]
    stage, _, set_ = id_.partition("/")
    history = store.history(stage, set_)
    mine = next((one for one in history if made is not None and one.fingerprint == made.fingerprint), None)
    if mine is None or not {"name", "limit"} <= set(mine.config):
        return set()
    same = [one for one in history if (one.config.get("name"), one.config.get("limit")) == (to.name, to.limit)]
    return {one.fingerprint for one in same if one.fingerprint in recorded or one.order > mine.order}


# -- what a run was made from


def made_from(stages: Mapping[str, Stage], sources: Mapping[str, Artifact]) -> str | None:
    """A digest of the configuration and of the images that shards are made from; None where the graph has no shards, or while a
    source has not been read."""
    told: dict[str, Any] = {}
    needed = closure(stages, PUBLISHED)
    if not any(stage.name == PUBLISHED for stage in needed.values()):
        return None
    for id_, stage in needed.items():
        if stage.name not in SOURCES:
            told[id_] = [stage.version, canonical(stage.config)]
        elif id_ in sources:
            told[id_] = dict(sources[id_].content)
        else:
            return None
    return digest("made_from", told)


def of_run(store: Store, run: Run) -> str | None:
    """The same digest of what a run made; None where it made no shards, or where an artifact is gone."""
    artifacts = artifacts_of(store, run)
    shards = next((one for one in artifacts.values() if one.stage == PUBLISHED), None)
    if shards is None:
        return None
    told: dict[str, Any] = {}
    waiting = [shards.id]
    while waiting:
        id_ = waiting.pop()
        if id_ in told:
            continue
        one = artifacts.get(id_)
        if one is None:
            return None
        told[id_] = dict(one.content) if one.stage in SOURCES else [one.version, canonical(one.config)]
        waiting += [source["stage"] for source in one.inputs.values()]
    return digest("made_from", told)
