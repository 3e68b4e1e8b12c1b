"""What is damaged in a store: looked for (`verify`), and taken back so that a run makes it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lodeset.infra.looking.summary import report_path
from lodeset.pipeline.dag.claims import live
from lodeset.pipeline.dag.damage import (
    Damage,
    Withdrawn,
    changed,
    contents,
    family,
    missing,
    noted,
    withdraw,
    without_part,
)
from lodeset.pipeline.dag.decisions import decide
from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.dag.stage import Stage
from lodeset.pipeline.dag.store import RUNS, Artifact, Store
from lodeset.pipeline.errors import DamagedError, HeldError

# How often a run is started again because a stage met damage. Each time all that lies beside it is looked at, too.
TRIES = 10


@dataclass(frozen=True)
class Verified:
    """What `verify` looked at and found; `affected` are the stages (by id) that the next run makes again, as far as the configuration
    still asks for them."""

    manifests: int
    files: int
    size_bytes: int
    deep: bool
    damage: tuple[Damage, ...]
    affected: tuple[str, ...]


def verify(store: Store, deep: bool) -> Verified:
    """Reads every manifest and looks for every file that they list; `deep` reads all of these and compares their digests. What is
    damaged is noted, where the store can be written: the next run makes it again."""
    held = contents(store)
    files = held.files()
    damage = [*held.damage, *without_part(held), *missing(store, files)]
    lost = {one.path for one in damage}
    if deep:
        damage += changed(store, [file for file in files if file.path not in lost])
    damage += [one for one in noted(store) if one.source]
    for one in damage:
        if not one.source:
            store.note({"path": one.path, "why": one.why})
    bad = {one.path for one in damage}
    affected = {one.id for one in held.artifacts if any(file.path in bad for file in one.files())}
    affected |= {"/".join(path.split("/")[1:3]) for path in bad if path.startswith("artifacts/")}
    return Verified(
        manifests=len(held.parts) + len(held.artifacts) + len(held.runs) + len(held.damage),
        files=len(files),
        size_bytes=sum(file.size_bytes for file in files),
        deep=deep,
        damage=tuple(sorted(damage, key=lambda one: one.path)),
        affected=tuple(sorted(affected)),
    )


def mend(
    store: Store,
    stages: Mapping[str, Stage],
    mine: str,
    watch: Callable[[Event], None],
    given: Mapping[str, Artifact],
) -> bool:
    """Takes back what is damaged of what these stages are, and whatever was noted; whether there was anything. `mine` is the name of
    this run's claim, `given` what the stages are made from besides.

    Raises:
        HeldError: there is damage, and another run is at work on the store.
    """
    damage = noted(store)
    beside = tuple({family(one.path) for one in damage if not one.source})
    if beside:
        damage += changed(store, [file for file in contents(store).files() if file.path.startswith(beside)])
    try:
        finished = [d.artifact for d in decide(store, stages, given=given).values() if d.artifact is not None]
        damage += missing(store, {file for one in finished for file in one.files()})
    except DamagedError:
        damage += noted(store)
    if not damage:
        return False
    others = [name for name in live(store) if name != mine]
    if others:
        raise HeldError(
            f"{store.url} is damaged ({damage[0].path}: {damage[0].why}), and another run is at work on it ({', '.join(others)}): "
            "wait for it, or stop it; then run again, which makes again what is damaged"
        )
    done = withdraw(store, damage)
    for one in done.damage:
        folder, _, name = one.path.rpartition("/")
        if folder == RUNS:
            store.delete(report_path(int(name.removesuffix(".json"))))  # another run will have this number
    _tell(done, stages, watch)
    return True


def _tell(done: Withdrawn, stages: Mapping[str, Stage], watch: Callable[[Event], None]) -> None:
    # What was noted is often found again by looking beside it.
    told = list(dict.fromkeys(f"{one.path}: {one.why}" for one in done.damage))
    reason = "; ".join(told[:3])
    more = f"; and {len(told) - 3:,} more" if len(told) > 3 else ""
    ids = {one.id for one in done.artifacts}
    for stage in [stage for id_, stage in stages.items() if id_ in ids] or list(stages.values())[:1]:
        watch(Event("damaged", stage, reason=reason + more))
