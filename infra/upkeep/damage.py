"""Find damage in a store (`verify`), and withdraw damaged files so that a run makes them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lodeset.infra.gates import accepted, outcome
from lodeset.infra.looking.summary import card_folder, report_path
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

# How often a run is restarted because a stage met damage. Each time everything next to it is checked, too.
TRIES = 10


@dataclass(frozen=True)
class Verified:
    """What `verify` checked and found; `affected` are the stages (by id) that the next run makes again if the
    configuration still requires them.
    """

    manifests: int
    files: int
    size_bytes: int
    deep: bool
    damage: tuple[Damage, ...]
    affected: tuple[str, ...]


def verify(store: Store, deep: bool) -> Verified:
    """Read every manifest and check every file that they list; `deep` also reads these files and compares their
    digests. Damage is recorded in the store if it can be written, so that the next run makes the files again.
    """
    held = contents(store)
    files = held.files()
    damage = [*held.damage, *without_part(held), *missing(store, files), *accepted.damaged(store)]
    damage += outcome.damaged(store)
    lost = {entry.path for entry in damage}
    if deep:
        damage += changed(store, [file for file in files if file.path not in lost])
    damage += [entry for entry in noted(store) if entry.source]
    for entry in damage:
        if not entry.source:
            store.note({"path": entry.path, "why": entry.why})
    bad = {entry.path for entry in damage}
    affected = {artifact.id for artifact in held.artifacts if any(file.path in bad for file in artifact.files())}
    affected |= {"/".join(path.split("/")[1:3]) for path in bad if path.startswith("artifacts/")}
    return Verified(
        manifests=len(held.parts) + len(held.artifacts) + len(held.runs) + len(held.damage),
        files=len(files),
        size_bytes=sum(file.size_bytes for file in files),
        deep=deep,
        damage=tuple(sorted(damage, key=lambda entry: entry.path)),
        affected=tuple(sorted(affected)),
    )


def mend(
    store: Store,
    stages: Mapping[str, Stage],
    mine: str,
    watch: Callable[[Event], None],
    given: Mapping[str, Artifact],
) -> bool:
    """Withdraw damaged files of these stages, and all recorded damage; return whether there was any. `mine` is the name
    of this run's claim, `given` are the artifacts that the stages also use as inputs.

    Raises:
        HeldError: there is damage, and another run is working on the store.
    """
    damage = noted(store)
    beside = tuple({family(entry.path) for entry in damage if not entry.source})
    if beside:
        damage += changed(store, [file for file in contents(store).files() if file.path.startswith(beside)])
    try:
        finished = [d.artifact for d in decide(store, stages, given=given).values() if d.artifact is not None]
        damage += missing(store, {file for artifact in finished for file in artifact.files()})
    except DamagedError:
        damage += noted(store)
    if not damage:
        return False
    others = [name for name in live(store) if name != mine]
    if others:
        raise HeldError(
            f"{store.url} is damaged ({damage[0].path}: {damage[0].why}), and another run is working on it "
            f"({', '.join(others)}): wait for it, or stop it; then run again to repair the damage"
        )
    done = withdraw(store, damage)
    for entry in done.damage:
        folder, _, name = entry.path.rpartition("/")
        if folder == RUNS:
            number = int(name.removesuffix(".json"))  # another run will get it
            store.delete(report_path(number))
            store.delete_folder(card_folder(number))
    _tell(done, stages, watch)
    return True


def _tell(done: Withdrawn, stages: Mapping[str, Stage], watch: Callable[[Event], None]) -> None:
    # Recorded damage is often found again by checking its neighbors.
    descriptions = list(dict.fromkeys(f"{entry.path}: {entry.why}" for entry in done.damage))
    reason = "; ".join(descriptions[:3])
    more = f"; and {len(descriptions) - 3:,} more" if len(descriptions) > 3 else ""
    ids = {artifact.id for artifact in done.artifacts}
    for stage in [stage for id_, stage in stages.items() if id_ in ids] or list(stages.values())[:1]:
        watch(Event("damaged", stage, reason=reason + more))
