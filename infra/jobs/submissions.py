"""What a store knows of the jobs that were submitted to make a data set in it: `submissions/<job>.json`.

The submitting machine writes one file per job, once. The job looks for it, to know that it sees the same store; numbers
of attempts go on from there when a head has forgotten its jobs; and `status` says that a job is on its way.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, dataclass

from lodeset.infra.jobs.names import attempt_of
from lodeset.pipeline.dag.claims import file_time
from lodeset.pipeline.dag.store import Store

SUBMISSIONS = "submissions"


@dataclass(frozen=True)
class Submission:
    """A job as it was submitted; `submitted` in seconds since 1970 by the clock of the machine `host`."""

    job: str
    name: str
    limit: int | None
    address: str
    configuration: str
    submitted: float
    host: str


def record(store: Store, job: str, name: str, limit: int | None, address: str, configuration: str) -> None:
    """Raises LodesetError or OSError: the store cannot be written."""
    told = Submission(job, name, limit, address, configuration, time.time(), socket.gethostname())
    store.prepare()
    store.put_absent(_path(job), json.dumps(asdict(told), indent=1).encode())


def recorded(store: Store, job: str) -> bool:
    return store.read(_path(job)) is not None


def jobs(store: Store) -> list[str]:
    return [name.removesuffix(".json") for name in store.names(SUBMISSIONS) if name.endswith(".json")]


def newest(store: Store, name: str, limit: int | None) -> tuple[Submission, float] | None:
    """The last job that was submitted to make this data set, and when, by the store's clock."""
    attempts = {attempt: job for job in jobs(store) if (attempt := attempt_of(job, name)) is not None}
    for _, job in sorted(attempts.items(), reverse=True):
        try:
            found = Submission(**json.loads(store.read(_path(job)) or b""))
        except (ValueError, TypeError):
            continue  # it is only news
        if found.limit == limit:
            return found, file_time(store, _path(job), found.submitted)
    return None


def _path(job: str) -> str:
    return f"{SUBMISSIONS}/{job}.json"
