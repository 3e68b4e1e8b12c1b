"""Apache Beam: the local runner by name, any other by options alone."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import psutil
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import PCollection

from pipeline.dag.background import repeating
from pipeline.dag.child import LOST_WORKER
from pipeline.engines.failures import Failed, failed
from pipeline.errors import LodesetError

# How long the local runner may take to end after its workers did.
_GRACE_S = 10.0


def options(cpus: int, given: Mapping[str, str]) -> PipelineOptions:
    """Options for a cluster (as given), or for `cpus` processes on this machine.

    `FnApiRunner` by name: `DirectRunner` first tries to download and run an executable.
    """
    flags = [f"--{name}={value}" for name, value in given.items()]  # this process's own arguments are none of Beam's
    if "runner" in given:
        return PipelineOptions(flags)
    return PipelineOptions(
        flags,
        runner="FnApiRunner",
        direct_num_workers=cpus,
        direct_running_mode="multi_processing" if cpus > 1 else "in_memory",
        default_sdk_harness_log_level="WARNING",
    )


@contextlib.contextmanager
def pipeline(cpus: int, given: Mapping[str, str]) -> Iterator[beam.Pipeline]:
    """A pipeline that is run when the block ends.

    Raises:
        LodesetError: what `raise_failures` found. Runners hand over a worker's exception as the text of its traceback.
    """
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    try:
        with _workers_watched(), beam.Pipeline(options=options(cpus, given)) as made:
            yield made
    except Exception as error:
        told = _RAISED.search(f"{type(error).__module__}.{type(error).__name__}: {error}") or _RAISED.search(str(error))
        if told is None:
            raise
        raise LodesetError(told.group(1)) from error


_RAISED = re.compile(r"^pipeline\.errors\.\w+: (.*?)(?: \[while running [^\]]*\])?$", re.MULTILINE)


def attempted(
    items: PCollection[Any], label: str, function: Callable[..., Iterable[Any] | None], *arguments: Any
) -> tuple[PCollection[Any], PCollection[Failed]]:
    """What `function(item, *arguments)` yields for every item, and what it raised.

    Nothing may raise in a worker: the local runner waits for ever once two workers have.
    """
    out = items | label >> beam.FlatMap(_attempt, function, *arguments).with_outputs(_FAILED, main="results")
    return out["results"], out[_FAILED]


_FAILED = "failed"


def _attempt(item: Any, function: Callable[..., Iterable[Any] | None], *arguments: Any) -> Iterator[Any]:
    try:
        yield from function(item, *arguments) or ()
    except Exception as error:
        yield beam.pvalue.TaggedOutput(_FAILED, failed(error))


def raise_failures(*failures: PCollection[Failed]) -> None:
    """Raises one of the failures, in one worker."""
    (
        failures
        | "failures" >> beam.Flatten()
        | "one key" >> beam.WithKeys(_one_key)
        | "together" >> beam.GroupByKey()
        | "raise" >> beam.Map(_raise)
    )


def _one_key(_: Failed) -> int:
    return 0


def _raise(grouped: tuple[int, Iterable[Failed]]) -> None:
    raise LodesetError(min(failure.message for failure in grouped[1]))


@contextlib.contextmanager
def _workers_watched() -> Iterator[None]:
    """Ends this process if a local worker dies: the local runner would wait for its answer for ever."""
    seen: set[int] = set()

    def look() -> float:
        alive = {p.pid for p in psutil.Process().children(recursive=True) if _is_worker(p)}
        seen.update(alive)
        if seen - alive and not ended.wait(_GRACE_S):
            print(f"a Beam worker ended before its work did: {sorted(seen - alive)}", file=sys.stderr, flush=True)
            os._exit(LOST_WORKER)
        return 1.0

    with repeating(look, 1.0) as ended:
        yield


def _is_worker(process: psutil.Process) -> bool:
    try:
        return (
            process.status() != psutil.STATUS_ZOMBIE
            and "apache_beam.runners.worker.sdk_worker_main" in process.cmdline()
        )
    except psutil.Error:
        return False
