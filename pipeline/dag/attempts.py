"""What a run says about itself while it works.

Each attempt to run has one file in the store, `attempts/<number>.json`, which is rewritten when a stage starts or ends and every
few seconds in between. It is news, not truth: what is finished is what manifests say. A file that is no longer rewritten proves
nothing but silence; whoever reads it (`infra.looking.now`) also looks at the claims.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from lodeset.pipeline.dag.background import repeating
from lodeset.pipeline.dag.claims import this_process
from lodeset.pipeline.dag.manifests import parsed, sealed
from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.dag.stage import Stage
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import without_secrets

ATTEMPTS = "attempts"
LOCAL_S, REMOTE_S = 2.0, 10.0  # between two pieces of news; far away each is a request
KEPT = 50  # attempts of a data set of which a store keeps the news

StageState = Literal["waiting", "running", "finished", "failed", "stopped"]
State = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class StageNews:
    """One stage of an attempt. Times are seconds since 1970 by the clock of the process that wrote them.

    Attributes:
        since: when this state began.
        waits_for: why it is not running, or what it lacks while it runs; empty if it moves.
        begun: when its phase began.
        fraction, count, unit, phase: as in `Progress`.
        parts_done, parts: committed parts and all parts of the phase; None where it has none.
        last_part: when the number of committed parts last rose.
        moved: when anything of this last changed.
        error, log: what went wrong, and the file with what the stage printed.
    """

    state: StageState
    since: float
    waits_for: str = ""
    begun: float = 0.0
    fraction: float = 0.0
    count: int = 0
    unit: str = "images"
    phase: str = ""
    parts_done: int | None = None
    parts: int | None = None
    last_part: float | None = None
    moved: float = 0.0
    error: str = ""
    log: str = ""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")


@dataclass(frozen=True)
class Attempt:
    """One attempt to run, as its process last wrote it.

    Attributes:
        number: 1, 2, ... in the store, in the order in which attempts began.
        name, limit, until: which data set, and how far, as in `Run`.
        owner: the process, with its host, boot and PID namespace; and the Ray job, if it runs in one.
        began, written: by the clock of that process.
        every: seconds until the next news at the latest.
        exit_code, error: how it ended.
    """

    number: int
    name: str
    limit: int | None
    until: str
    owner: Mapping[str, Any]
    began: float
    written: float
    every: float
    state: State
    stages: Mapping[str, StageNews]
    exit_code: int | None = None
    error: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")


_ATTEMPT = TypeAdapter(Attempt)


def claim_name(name: str, limit: int | None) -> str:
    """The claim that an attempt to make this data set holds."""
    return f"run-{name}" if limit is None else f"run-{name}@{limit}"  # no name has an @


def path_of(number: int) -> str:
    return f"{ATTEMPTS}/{number:06d}.json"


def numbers(store: Store) -> list[int]:
    """The numbers of the attempts that the store has news of, rising."""
    names = (name.removesuffix(".json") for name in store.names(ATTEMPTS) if name.endswith(".json"))
    return sorted(int(name) for name in names if name.isdecimal())


def read(store: Store, number: int) -> Attempt | None:
    """An attempt's news; None where there is none, or where it is damaged: it is only news."""
    data = store.read(path_of(number))
    try:
        return None if data is None else parsed(_ATTEMPT, data)
    except ValueError:
        return None


def newest(store: Store, name: str, limit: int | None) -> Attempt | None:
    """The last attempt to make this data set."""
    for number in reversed(numbers(store)):
        attempt = read(store, number)
        if attempt is not None and (attempt.name, attempt.limit) == (name, limit):
            return attempt
    return None


class News:
    """Keeps the file of one attempt up to date. Every method may be called from any thread."""

    def __init__(self, store: Store, attempt: Attempt) -> None:
        self._store, self._lock, self._writing = store, threading.Lock(), threading.Lock()
        self.attempt = attempt

    def watch(self, event: Event) -> None:
        """Takes note of what the runner tells."""
        with self._lock:
            now = time.time()
            before = self.attempt.stages.get(event.stage.id)
            after = _after(before, event, now)
            self.attempt = replace(self.attempt, stages={**self.attempt.stages, event.stage.id: after})
        # A request to a store far away may be repeated for minutes: the runner does not wait for it.
        if event.kind != "progress" and self._store.local:
            self.write()

    def ended(self, state: State, exit_code: int, error: str = "") -> None:
        with self._lock:
            stages = self.attempt.stages
            if state != "done":
                stages = {id_: _cut_off(stage) for id_, stage in stages.items()}
            told = without_secrets(error)
            self.attempt = replace(self.attempt, state=state, exit_code=exit_code, error=told, stages=stages)
        self.write()

    def write(self) -> float:
        """Writes the file, and returns the seconds until it is to be written again. A store that cannot be written now must not
        stop the run, whose own writes say so if it lasts."""
        with self._writing:
            with self._lock:
                told = self.attempt = replace(self.attempt, written=time.time())
            with contextlib.suppress(OSError, LodesetError):
                self._store.overwrite(path_of(told.number), sealed(asdict(told)))
        return told.every


def _cut_off(stage: StageNews) -> StageNews:
    return replace(stage, state="stopped") if stage.state == "running" else stage


def _after(before: StageNews | None, event: Event, now: float) -> StageNews:
    old = before or StageNews("waiting", now, moved=now)
    if event.kind == "waiting":
        return replace(old, waits_for=event.reason)
    if event.kind == "again":
        return StageNews(
            "waiting", now, f"its next try, after it lost workers: {without_secrets(event.reason)}", moved=now
        )
    if event.kind == "started":
        return StageNews("running", now, begun=now, moved=now, log=event.log)
    if event.kind == "failed":
        return replace(old, state="failed", since=now, waits_for="", moved=now, error=without_secrets(event.reason))
    if event.kind in ("done", "finished", "taken over"):
        return replace(old, state="finished", since=now, waits_for="", fraction=1.0, moved=now)
    if event.kind == "damaged":
        return StageNews("waiting", now, "to be made again: " + event.reason, moved=now)
    told = event.progress
    if told is None:
        return old
    begun = told.phase != old.phase
    # The first figure of a phase is what was found finished.
    known = None if begun else old.parts_done
    risen = told.parts_done is not None and known is not None and told.parts_done > known
    moved = begun or risen or told.fraction > old.fraction or told.count > old.count
    return replace(
        old,
        waits_for=told.waits_for,
        begun=now if begun else old.begun,
        fraction=told.fraction,
        count=told.count,
        unit=told.unit,
        phase=told.phase,
        parts_done=told.parts_done,
        parts=told.parts,
        last_part=now if risen else old.last_part,
        moved=now if moved else old.moved,
    )


@contextlib.contextmanager
def attempt(
    store: Store,
    stages: Mapping[str, Stage],
    watch: Callable[[Event], None],
    *,
    name: str,
    limit: int | None = None,
    until: str = "",
    versions: Mapping[str, str] | None = None,
) -> Iterator[Callable[[Event], None]]:
    """Keeps the news of an attempt while the block runs, and of how it ended; yields the callback that the runner is to tell."""
    now, every = time.time(), LOCAL_S if store.local else REMOTE_S
    waiting = {id_: StageNews("waiting", now, moved=now) for id_ in stages}
    news = _begun(store, Attempt(0, name, limit, until, this_process(), now, now, every, "running", waiting, versions=versions or {}))  # fmt: skip

    def both(event: Event) -> None:
        news.watch(event)
        watch(event)

    try:
        with repeating(news.write, every):
            yield both
    except LodesetError as error:
        news.ended("failed", error.exit_code, str(error))
        raise
    except KeyboardInterrupt:
        news.ended("stopped", 130)
        raise
    except BaseException as error:
        news.ended("failed", 1, f"{type(error).__name__}: {error}")
        raise
    news.ended("done", 0)


def _begun(store: Store, attempt: Attempt) -> News:
    """Takes the next number, and forgets the news of long ago."""
    known = numbers(store)
    if len(known) >= KEPT:
        own = [n for n in known if (old := read(store, n)) and (old.name, old.limit) == (attempt.name, attempt.limit)]
        for number in own[: max(0, len(own) - KEPT)]:
            store.delete(path_of(number))
    number = 1 + max(known, default=0)
    while not store.put_absent(path_of(number), sealed(asdict(replace(attempt, number=number)))):
        number += 1
    return News(store, replace(attempt, number=number))
