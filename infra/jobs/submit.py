"""Send a run to a cluster as a job, once: a job of the same run that is at work is followed instead."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodeset.infra.jobs import bundle, submissions
from lodeset.infra.jobs.bundle import Resolved
from lodeset.infra.jobs.errors import Taken, Unreachable
from lodeset.infra.jobs.follow import FINAL, status_of
from lodeset.infra.jobs.names import (
    CONFIGURATION,
    CPUS,
    MEMORY,
    NAME,
    STOP,
    STORE,
    attempt_of,
    named,
    next_attempt,
)
from lodeset.infra.jobs.pending import GIB, Asked
from lodeset.pipeline.dag.claims import JOB
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown

if TYPE_CHECKING:
    from lodeset.infra.jobs.client import Head

_TRIES, _PAUSE_S = 5, 2.0


@dataclass(frozen=True)
class Options:
    """How a job runs.

    Attributes:
        until, fresh: as for `lodeset run`.
        stop_s: seconds between SIGTERM and SIGKILL when the job is stopped.
        python: the interpreter on the node where the driver runs.
    """

    until: str | None = None
    fresh: bool = False
    stop_s: int = 120
    python: str = "python"
    asked: Asked = field(default_factory=Asked)


@dataclass(frozen=True)
class Submitted:
    """A job that is on its way.

    Attributes:
        new: False for a job that was there before.
        same: whether it runs the configuration that was asked for.
    """

    job: str
    new: bool
    same: bool


def submit(head: Head, config: Resolved, options: Options, tell: Callable[[str], None]) -> Submitted:
    """Starts the next attempt of a run, or finds the one that is at work.

    Raises:
        LodesetError: the head refused, or did not answer.
    """
    run = config.config.name
    with tempfile.TemporaryDirectory(prefix="lodeset-submit-") as folder:
        file = Path(folder) / bundle.NAME
        failure: LodesetError | None = None
        for _ in range(_TRIES):
            jobs = head.list_jobs()
            if (running := at_work(jobs, config)) is not None:
                return running
            if not file.exists():
                bundle.write(config, file)
            job = named(run, next_attempt([*(one.submission_id or "" for one in jobs), *_known(config)], run))
            recorded = _recorded(config, job, head.url, tell)
            try:
                head.submit_job(**_asked_of_ray(config, options, job, file, recorded))
                return Submitted(job, new=True, same=True)
            except Taken:
                continue  # somebody else was faster
            except Unreachable as error:
                tell(f"{error}. Looking whether the job arrived")
                time.sleep(_PAUSE_S)
                if any(one.submission_id == job for one in head.list_jobs()):
                    return Submitted(job, new=True, same=True)
                failure = error
    raise failure or LodesetError(
        f"others submitted {run} to {head.url} {_TRIES} times while this tried to: see `lodeset jobs list`"
    )


def at_work(jobs: Iterable[Any], config: Resolved) -> Submitted | None:
    """The job of the same run, in the same store, that has not ended."""
    mine = identity(config)
    for one in jobs:
        about = one.metadata or {}
        same_run = one.submission_id and attempt_of(one.submission_id, config.config.name) is not None
        if same_run and about.get(STORE) == mine[STORE] and status_of(one) not in FINAL:
            return Submitted(one.submission_id, new=False, same=about.get(CONFIGURATION) == mine[CONFIGURATION])
    return None


def identity(config: Resolved) -> dict[str, str]:
    """By what a job is known to be of a run. The URL of the store holds no credential: `resolved` refuses those."""
    return {NAME: config.config.name, STORE: config.config.store, CONFIGURATION: config.digest}


def entrypoint(options: Options, expected: str = "") -> str:
    """The command of the driver, which first looks whether the store knows the job `expected`, if there is one."""
    python = shlex.quote(options.python)
    run = [python, "-m", "lodeset", "run", bundle.CONFIG]
    if options.until is not None:
        run += ["--until", shlex.quote(options.until)]
    if options.fresh:
        run.append("--fresh")
    arrived = [python, "-m", "lodeset.infra.jobs.arrived", bundle.CONFIG, *([expected] if expected else [])]
    return f"{' '.join(arrived)} && exec {' '.join(run)}"


def _asked_of_ray(config: Resolved, options: Options, job: str, file: Path, recorded: bool) -> dict[str, Any]:
    asked = options.asked
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(options.stop_s), JOB: job}
    return {
        "entrypoint": entrypoint(options, job if recorded else ""),
        "submission_id": job,
        "runtime_env": {"working_dir": str(file), "env_vars": environment},
        "metadata": {
            **identity(config),
            STOP: str(options.stop_s),
            CPUS: f"{asked.cpus:g}",
            MEMORY: f"{asked.memory_gb:g}",
        },
        "entrypoint_num_cpus": asked.cpus or None,
        "entrypoint_memory": int(asked.memory_gb * GIB) or None,
    }


def _known(config: Resolved) -> list[str]:
    """The jobs that the store knows: numbers go on where a restarted head has forgotten them."""
    from lodeset.pipeline.dag.store import Store

    try:
        return submissions.jobs(Store(config.config.store))
    except (OSError, LodesetError):
        return []


def _recorded(config: Resolved, job: str, address: str, tell: Callable[[str], None]) -> bool:
    """Puts the submission into the store, where the job looks for it; whether that worked from this machine."""
    from lodeset.pipeline.dag.store import Store

    made = config.config
    try:
        submissions.record(Store(made.store), job, made.name, made.ingest.limit, address, config.digest)
    except (OSError, LodesetError) as error:
        tell(f"the store cannot be written from here ({shown(error)}); the job will try from the cluster")
        return False
    return True
