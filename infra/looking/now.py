"""Answer from the store alone whether a run is at work, how far it is, and what to do next.

The run's own news (`pipeline.dag.attempts`) and the claims are all that is read: no cluster is asked and no log is followed. Silence
is reported as silence. That a run has ended is only said where the run said so, or where its process is known to be gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lodeset.infra.jobs import submissions
from lodeset.pipeline.dag import attempts
from lodeset.pipeline.dag.attempts import Attempt, StageNews
from lodeset.pipeline.dag.claims import LEASE_SECONDS, Holder, file_time, holders, is_gone
from lodeset.pipeline.dag.claims import clock as clock_of
from lodeset.pipeline.dag.runs import newest_first
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.tables.forgotten import CLAIM as TAKE_DOWN

Life = Literal["never run", "running", "silent", "killed", "failed", "stopped", "done"]

STILL_S = 60.0  # without any progress for so long, a stage is said not to move
# Exit codes of `--check` and `--watch`; a failed run has its own.
NOT_DONE, GATE, HELD = 1, 3, 4


@dataclass(frozen=True)
class StageNow:
    """One stage of the last attempt. Ages are in seconds.

    Attributes:
        rate: units per second since the phase began, in this attempt.
        last_part_age: since a part was last committed; None if none was, or if the stage does not count parts.
        still_for: since anything of a running stage last changed.
    """

    id: str
    state: str
    age: float
    waits_for: str
    fraction: float
    phase: str
    count: int
    unit: str
    rate: float | None
    parts_done: int | None
    parts: int | None
    last_part_age: float | None
    still_for: float
    error: str
    log: str


@dataclass(frozen=True)
class Now:
    """The state of the last attempt to make a data set.

    Attributes:
        state: what is known. `silent`: it has neither ended nor been heard of lately.
        moving: whether it makes progress; None if that cannot be known.
        why: the reason, in a sentence.
        safe_to_run: whether `lodeset run` may be started now. It is always harmless to the data.
        attempt, began, exit_code, error: of the attempt, None or empty if there was none.
        heard: seconds since its last news, by the store's clock.
        owner: host, process number, and the Ray job if there is one.
        claims: all who hold claims on this store.
        submitted: the command that follows a job which was submitted since and has left no news; it says what the job lacks.
    """

    state: Life
    moving: bool | None
    why: str
    safe_to_run: bool
    attempt: int | None
    began: float | None
    heard: float | None
    exit_code: int | None
    error: str
    owner: Mapping[str, Any]
    stages: tuple[StageNow, ...]
    claims: tuple[str, ...]
    submitted: str = ""

    @property
    def at_work(self) -> bool:
        """Whether a run is at work, as far as anybody can tell."""
        return self.state in ("running", "silent")

    def status_code(self, changed: bool | None) -> int:
        """The exit code for scripts: 0 finished, and nothing has changed since; 4 a run is at work; 3 a gate was breached; else 1,
        also where nobody can tell whether anything has changed (`changed` is None)."""
        if self.at_work and not self.safe_to_run:
            return HELD
        if self.state == "done":
            return 0 if changed is False else NOT_DONE
        return GATE if self.exit_code == GATE else NOT_DONE

    def next_command(self, given: str, changed: bool | None) -> str:
        """The exact next command; `given` is the configuration as it was given, with its options."""
        if self.state == "running" or not self.safe_to_run:
            return f"lodeset status {given} --watch"
        if self.submitted:
            return self.submitted
        if self.state == "never run" or self.exit_code == HELD:  # refused, since it would repeat what was rolled back
            return f"lodeset plan {given}"
        if self.exit_code == GATE or (self.state == "done" and changed is False):
            return f"lodeset report {given}"
        return f"lodeset run {given}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def now(store: Store, name: str, limit: int | None) -> Now:
    """The state of the last attempt to make the data set `name` (of a sample of `limit` images), or of a job that was submitted
    since and has left no news."""
    found, sent = _attempted(store, name, limit), submissions.newest(store, name, limit)
    if sent is None or found.at_work:
        return found
    submission, when = sent
    last = None if found.attempt is None else file_time(store, attempts.path_of(found.attempt), 0.0)
    if found.owner.get("job") == submission.job or (last is not None and last > when):
        return found
    age = max(0.0, clock_of(store) - when)
    told = f"{submission.job} was submitted to {submission.address} {age:.0f} s ago and has left no news yet"
    why = told if found.state == "never run" else f"{found.why}; {told}"
    follow = f"lodeset jobs logs {submission.job} --follow --address {submission.address}"
    return replace(found, why=why, submitted=follow)


def _attempted(store: Store, name: str, limit: int | None) -> Now:
    attempt = attempts.newest(store, name, limit)
    clock, held = (clock_of(store), holders(store)) if store.names("claims") or attempt is not None else (0.0, [])
    own = next((holder for holder in held if holder.claim == attempts.claim_name(name, limit)), None)
    others = [holder for holder in held if holder.claim == TAKE_DOWN]
    claims = tuple(f"{holder.claim} ({holder})" for holder in held)
    if attempt is not None and own is not None and not _same(own.owner, attempt.owner):
        attempt = None  # another run has begun since
    if attempt is None:
        state, why = _without_news(store, name, limit, own)
        moving = None if own else False
        return Now(state, moving, why, own is None and not others, None, None, None, None, "", {}, (), claims)
    heard = max(0.0, clock - file_time(store, attempts.path_of(attempt.number), clock))
    state, moving, why = _judged(attempt, own, heard)
    safe = state not in ("running", "silent") or (state == "silent" and own is None)
    if others:
        safe, why = False, f"{why}; something is being deleted from the store ({others[0]})"
    return Now(
        state,
        moving,
        why,
        safe,
        attempt.number,
        attempt.began,
        heard,
        attempt.exit_code,
        attempt.error,
        {key: attempt.owner.get(key) for key in ("host", "pid", "job") if attempt.owner.get(key) is not None},
        tuple(_stage(id_, stage, attempt, heard) for id_, stage in attempt.stages.items()),
        claims,
    )


def _without_news(store: Store, name: str, limit: int | None, own: Holder | None) -> tuple[Life, str]:
    """What is known where no attempt has left news: it was deleted, or a lodeset that left none was at work."""
    if own is not None:
        return "silent", f"a run holds the claim ({own}) and has left no news yet"
    if any(run.limit == limit for run in newest_first(store, name)):
        return "done", "the last run finished; there is no news of any later one"
    return "never run", "no run of this data set is on record"


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two owners are the same process."""
    return all(one.get(key) == other.get(key) for key in ("host", "boot", "namespace", "pid", "started"))


def _judged(attempt: Attempt, own: Holder | None, heard: float) -> tuple[Life, bool | None, str]:
    if attempt.state == "done":
        return "done", False, "the last run finished"
    if attempt.state == "failed":
        return "failed", False, attempt.error or "the last run failed"
    if attempt.state == "stopped":
        return "stopped", False, "the last run was stopped; what it finished stays"
    if is_gone(attempt.owner):
        return (
            "killed",
            False,
            f"{_process(attempt)} ended without a word (killed, or out of memory); what it finished stays",
        )
    if heard > 3 * attempt.every + 5:
        if own is not None:
            return "silent", None, f"{_process(attempt)} holds its claim ({own}) and has sent no news for {heard:.0f} s"
        return (
            "silent",
            None,
            f"no news of {_process(attempt)} for {heard:.0f} s, and its claim of {LEASE_SECONDS:.0f} s ran out: it was killed, "
            "or it cannot reach the store. To run again is safe: if it is alive, that costs time and no data",
        )
    running = {id_: stage for id_, stage in attempt.stages.items() if stage.state == "running"}
    moving = [id_ for id_, stage in running.items() if attempt.written - stage.moved + heard < STILL_S]
    if moving:
        return (
            "running",
            True,
            f"{', '.join(moving)} makes progress" if len(moving) == 1 else f"{', '.join(moving)} make progress",
        )
    if running:
        return (
            "running",
            False,
            "; ".join(_still(id_, stage, attempt.written + heard) for id_, stage in running.items()),
        )
    waiting = [stage.waits_for for stage in attempt.stages.values() if stage.state == "waiting" and stage.waits_for]
    waits = sorted({why for why in waiting if not why.startswith("after ")})
    if waits:
        return "running", heard < STILL_S, f"between stages; the next waits for {waits[0]}"
    return "running", True, "between stages" if waiting else "it is starting"


def _process(attempt: Attempt) -> str:
    return f"process {attempt.owner.get('pid')} on {attempt.owner.get('host')}"


def _still(id_: str, stage: StageNews, at: float) -> str:
    told = f"{id_} has made no progress for {at - stage.moved:.0f} s"
    if stage.phase:
        told += f" in `{stage.phase}`"
    return f"{told}: it waits for {stage.waits_for}" if stage.waits_for else f"{told} (its log: {stage.log})"


def _stage(id_: str, stage: StageNews, attempt: Attempt, heard: float) -> StageNow:
    # Times of the writer's clock are compared with each other, and what passed since then is by the store's clock.
    age = max(0.0, attempt.written - stage.since) + heard
    worked = attempt.written - stage.begun
    return StageNow(
        id=id_,
        state=stage.state,
        age=age,
        waits_for=stage.waits_for,
        fraction=stage.fraction,
        phase=stage.phase,
        count=stage.count,
        unit=stage.unit,
        rate=stage.count / worked if stage.state == "running" and stage.count >= worked > 1 else None,
        parts_done=stage.parts_done,
        parts=stage.parts,
        last_part_age=None if stage.last_part is None else max(0.0, attempt.written - stage.last_part) + heard,
        still_for=max(0.0, attempt.written - stage.moved) + heard if stage.state == "running" else 0.0,
        error=stage.error,
        log=stage.log,
    )
