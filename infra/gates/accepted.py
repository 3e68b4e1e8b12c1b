"""Accepted runs: events in the store that say which run others are compared with. Nothing changes or deletes one."""

from __future__ import annotations

import getpass
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from lodeset.pipeline.dag.damage import Damage
from lodeset.pipeline.dag.manifests import Run, parsed, sealed
from lodeset.pipeline.dag.runs import artifacts_of
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables.forgotten import refuse_during_take_down

FOLDER = "accepted"


@dataclass(frozen=True)
class Accepted:
    """One event.

    Attributes:
        number: 1, 2, ... in the store. The last event of a data set counts.
        run: the run that was accepted.
        name, limit: which data set it is a version of, as for runs.
        at: when, UTC.
        by, why: who accepted it, and the reason that they gave.
    """

    number: int
    run: int
    name: str
    limit: int | None
    at: str
    by: str
    why: str

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_EVENT = TypeAdapter(Accepted)


def accept(store: Store, run: Run, by: str | None = None, why: str = "") -> Accepted:
    """Marks a run as the one that later runs of its data set are compared with.

    Raises:
        LodesetError: an artifact of the run is gone, so that nothing could be compared with it.
        HeldError: something is being deleted from the store.
    """
    refuse_during_take_down(store)
    made = [id_ for id_, artifact in run.stages.items() if artifact is not None]
    gone = [id_ for id_ in made if id_ not in artifacts_of(store, run)]
    if gone:
        raise LodesetError(
            f"run {run.number} cannot be accepted: {len(gone)} of its {len(made)} artifacts are gone from {store.url} "
            f"({', '.join(gone)}): accept a later run"
        )
    told = (run.number, run.name, run.limit, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), by or user(), why)
    while True:
        number = 1 + max(_numbers(store), default=0)
        event = Accepted(number, *told)
        if store.put_absent(_path(number), sealed(event.to_json())):
            return event


def accepted(store: Store, name: str, limit: int | None) -> Accepted | None:
    """The event that counts for a data set."""
    return next((one for one in _newest_first(store) if (one.name, one.limit) == (name, limit)), None)


def baselines(store: Store) -> frozenset[int]:
    """The numbers of all runs that something is compared with: a clean-up must keep what they made."""
    last: dict[tuple[str, int | None], int] = {}
    for one in _newest_first(store):
        last.setdefault((one.name, one.limit), one.run)
    return frozenset(last.values())


def damaged(store: Store) -> list[Damage]:
    """Events that are not what was written."""
    found = []
    for number in _numbers(store):
        try:
            parsed(_EVENT, store.read(_path(number)) or b"")
        except ValueError as error:
            found.append(Damage(_path(number), str(error)))
    return found


def user() -> str:
    """Who runs this process, as far as the system knows."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number that no user has
        return "unknown"


def _newest_first(store: Store) -> Iterator[Accepted]:
    for number in reversed(_numbers(store)):
        data = store.read(_path(number))
        if data is None:
            continue
        try:
            yield parsed(_EVENT, data)
        except ValueError as error:
            raise store.damaged(_path(number), str(error)) from error


def _numbers(store: Store) -> list[int]:
    names = (name.removesuffix(".json") for name in store.names(FOLDER))
    return sorted(int(name) for name in names if name.isdecimal())


def _path(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"
