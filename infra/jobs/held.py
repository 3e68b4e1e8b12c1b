"""The jobs of lodeset that a head has, and the end of one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lodeset.infra.jobs.errors import Unreachable
from lodeset.infra.jobs.follow import FINAL, Ended, ended, status_of
from lodeset.infra.jobs.names import NAME, STOP, STORE
from lodeset.pipeline.errors import LodesetError

if TYPE_CHECKING:
    from lodeset.infra.jobs.client import Head

_MARGIN_S = 30.0  # beyond what the job may take to stop
_PENDING_S = 5.0  # for which a job that has not begun is waited for: Ray keeps the order to stop until it begins (2.60)
_POLL_S = 1.0


@dataclass(frozen=True)
class Job:
    """A job of lodeset on a head; times in seconds since 1970."""

    job: str
    name: str
    store: str
    status: str
    began: float | None
    ended: float | None
    exit_code: int | None


def jobs(head: Head) -> list[Job]:
    """The jobs of lodeset that the head knows, newest first."""
    found = [_job(one) for one in head.list_jobs() if one.submission_id and NAME in (one.metadata or {})]
    return sorted(found, key=lambda job: (job.began or 0.0, job.job), reverse=True)


def _job(one: Any) -> Job:
    status = status_of(one)
    return Job(
        job=one.submission_id,
        name=one.metadata[NAME],
        store=one.metadata.get(STORE, ""),
        status=status,
        began=one.start_time / 1000 if one.start_time else None,
        ended=one.end_time / 1000 if one.end_time else None,
        exit_code=ended(one.submission_id, one).exit_code if status in FINAL else None,
    )


def stop(head: Head, job: str, tell: Callable[[str], None]) -> Ended | None:
    """Stops a job and waits for its end; None if it has not begun and will end when it does. A job that has ended stays
    as it is.

    Raises:
        LodesetError: the head does not know it, or it has not ended in the time that it was given to stop.
    """
    seen = head.get_job_info(job)
    if status_of(seen) in FINAL:
        return ended(job, seen)
    allowed = float((seen.metadata or {}).get(STOP, 3)) + _MARGIN_S
    head.stop_job(job)
    tell(f"{job} is being stopped; it has {allowed - _MARGIN_S:.0f} s to end in order")
    began = time.monotonic()
    while time.monotonic() < began + allowed:
        try:
            seen = head.get_job_info(job)
        except Unreachable as error:
            tell(str(error))
        if status_of(seen) in FINAL:
            return ended(job, seen)
        if status_of(seen) == "PENDING" and time.monotonic() > began + _PENDING_S:
            tell(
                f"{job} has not begun, and Ray stops a job only when it begins: it will end then, without running. A "
                "head gives up on a job that does not begin after 900 s (RAY_JOB_START_TIMEOUT_SECONDS)"
            )
            return None
        time.sleep(_POLL_S)
    raise LodesetError(
        f"{job} was told to stop {allowed:.0f} s ago, and the head says that it is {status_of(seen)}: look at its log "
        f"(`lodeset jobs logs {job}`), and at the nodes of the cluster"
    )
