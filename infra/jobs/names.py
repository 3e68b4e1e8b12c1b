"""The names of jobs, `<name of the data set>-<attempt>`, and the keys under which a job says what it is.

Ray never starts a name twice, and it forgets names with its head.
"""

from __future__ import annotations

from collections.abc import Iterable

# In a job's metadata. Several data sets, or stores, may share a name on one cluster, so the name alone is not the run.
NAME, STORE, CONFIGURATION = "lodeset_name", "lodeset_store", "lodeset_configuration"
# What was asked for it, which the head does not repeat.
STOP, CPUS, MEMORY = "lodeset_stop_s", "lodeset_driver_cpus", "lodeset_driver_memory_gb"


def named(run: str, attempt: int) -> str:
    return f"{run}-{attempt}"


def attempt_of(job: str, run: str) -> int | None:
    """The attempt that a name stands for; None if it is not a job of this run."""
    start, dash, number = job.rpartition("-")
    return int(number) if dash and start == run and number.isascii() and number.isdecimal() else None


def next_attempt(jobs: Iterable[str], run: str) -> int:
    return 1 + max((found for job in jobs if (found := attempt_of(job, run)) is not None), default=0)
