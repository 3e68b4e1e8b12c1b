"""The commands that send runs to a Ray cluster, and look after them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lodeset.infra.cli.options import Json, Screen, Set, err, out, print_json, safe
from lodeset.infra.cli.tables import print_whole
from lodeset.pipeline.errors import ConfigError, Terminated

if TYPE_CHECKING:
    from lodeset.infra.jobs.client import Head
    from lodeset.infra.jobs.follow import Ended

submitting = typer.Typer()
jobs = typer.Typer(no_args_is_help=True, help="List, follow and stop the jobs of a Ray cluster.")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="configuration file (`lodeset init` writes one)")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        help="the dashboard of the cluster's head, e.g. http://HEAD:8265",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="its name, e.g. lodeset-3")]


@submitting.command()
def submit(
    config: ConfigPath,
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", help="return once the job is submitted")] = False,
    set_: Set = None,
    until: Annotated[str | None, typer.Option(help="stop after this stage, e.g. dedup")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="first draw a seeded sample of N pool images")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="ignore everything that earlier runs fitted")] = False,
    driver_cpus: Annotated[
        float, typer.Option(min=0, help="cores of one node for the driver, which then runs on any node [default: head]")
    ] = 0,
    driver_memory: Annotated[float, typer.Option(min=0, metavar="GIB", help="memory of one node for the driver")] = 0,
    stop_seconds: Annotated[int, typer.Option(min=3, help="time that a stop leaves the run to end in order")] = 120,
    python: Annotated[str, typer.Option(help="the interpreter on the cluster")] = "python",
    patience: Annotated[float, typer.Option(min=0, help="seconds for which the head may not answer")] = 600,
    as_json: Json = False,
) -> None:
    """Run on a Ray cluster, follow the log, and end with the exit code of the run."""
    from lodeset.infra.jobs.bundle import resolved
    from lodeset.infra.jobs.pending import Asked
    from lodeset.infra.jobs.submit import Options, submit

    limits = (f"ingest.limit={limit}",) if limit is not None else ()
    sent = resolved(config, (*(set_ or ()), *limits))
    head = _head(address)
    if head.in_the_clear:
        _tell(f"the token goes to {head.url} unencrypted: use https or a tunnel outside of a network of your own")
    if sent.local:
        paths = ", ".join(f"{key} {path}" for key, path in sent.local)
        _tell(f"looked up on the cluster, where they must be the same files as here: {paths}")
    options = Options(until, fresh, stop_seconds, python, Asked(driver_cpus, driver_memory))
    job = submit(head, sent, options, _tell)
    if job.new:
        _tell(f"submitted {job.job} to {head.url}")
    else:
        _tell(f"{job.job} is at work on this run already: nothing was submitted")
        if not job.same:
            _tell("its configuration is another one: submit again when it has ended")
    if detach:
        if as_json:
            print_json({"job": job.job, "address": head.url, "new": job.new, "same": job.same})
        else:
            out.print(job.job)
            _tell(_ways_on(job.job, head.url))
        return
    with _detaching(job.job, head.url, as_json):
        done = _followed(head, job.job, patience, _lines_to(err))
    if as_json:
        print_json({**asdict(done), "address": head.url, "new": job.new, "same": job.same})
    raise typer.Exit(done.exit_code)


@jobs.command("list")
def list_(address: Address = None, as_json: Json = False) -> None:
    """List the jobs of lodeset that the cluster knows, newest first."""
    from lodeset.infra.jobs.held import jobs

    found = jobs(_head(address))
    if as_json:
        print_json({"jobs": [asdict(job) for job in found]})
        return
    table = Table("job", "status", "exit code", "began", "seconds", "store", box=None, pad_edge=False)
    for job in found:
        began = datetime.fromtimestamp(job.began).strftime("%Y-%m-%d %H:%M:%S") if job.began else ""
        seconds = f"{job.ended - job.began:,.0f}" if job.began and job.ended else ""
        code = "" if job.exit_code is None else str(job.exit_code)
        table.add_row(safe(job.job), job.status, code, began, seconds, safe(job.store))
    print_whole(out, table)


@jobs.command()
def logs(
    job: JobName,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="until the job has ended; then end as it did")] = False,
    patience: Annotated[float, typer.Option(min=0, help="seconds for which the head may not answer")] = 600,
    as_json: Json = False,
) -> None:
    """Print the log of a job."""
    from lodeset.infra.jobs.follow import status_of

    head = _head(address)
    if not follow:
        status = status_of(head.get_job_info(job))
        text = head.get_job_logs(job)
        if as_json:
            print_json({"job": job, "status": status, "log": text})
        else:
            for line in text.splitlines():
                _lines_to(out)(line)
        return
    lines: list[str] = []
    with _detaching(job, head.url, as_json):
        done = _followed(head, job, patience, lines.append if as_json else _lines_to(out))
    if as_json:
        print_json({**asdict(done), "log": "\n".join(lines)})
    raise typer.Exit(done.exit_code)


@jobs.command()
def stop(job: JobName, address: Address = None, as_json: Json = False) -> None:
    """Stop a job, and wait until it has ended."""
    from lodeset.infra.jobs.held import stop

    done = stop(_head(address), job, _tell)
    if as_json:
        print_json(asdict(done) if done is not None else {"job": job, "status": "PENDING"})
    else:
        out.print(f"{safe(job)} {done.status if done is not None else 'PENDING'}", highlight=False)


def _head(address: str | None) -> Head:
    from lodeset.infra.jobs.client import Head

    if address is None:
        raise ConfigError(
            "which cluster? Give the dashboard of its head (--address http://HEAD:8265), or set RAY_API_SERVER_ADDRESS"
        )
    return Head(address)


def _followed(head: Head, job: str, patience: float, show: Callable[[str], None]) -> Ended:
    from lodeset.infra.jobs.follow import Waits, follow

    done = follow(head, job, show, _tell, Waits(unseen=patience))
    _tell(f"{done.job} {done.status}, exit code {done.exit_code}")
    if done.message:
        _tell(done.message)
    return done


@contextmanager
def _detaching(job: str, address: str, as_json: bool) -> Iterator[None]:
    """An interrupt ends the following and not the job."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        code = 143 if isinstance(interrupt, Terminated) else 130
        if as_json:
            print_json({"job": job, "address": address, "status": "not followed any more", "exit_code": code})
        _tell(f"no longer following; the job goes on. {_ways_on(job, address)}")
        raise typer.Exit(code) from None


def _ways_on(job: str, address: str) -> str:
    return (
        f"Follow it: `lodeset jobs logs {job} --follow --address {address}`; "
        f"stop it: `lodeset jobs stop {job} --address {address}`"
    )


def _tell(text: str) -> None:
    err.print(text, style="cyan", markup=False, soft_wrap=True)


def _lines_to(screen: Screen) -> Callable[[str], None]:
    return lambda line: screen.print(line, markup=False, soft_wrap=True)
