"""Apache Beam: the local runner by name, any other runner only through options.

The work is done by lodeset's own worker processes (`pipeline.engines.processes`), not by Beam's: Beam's local
multi-process runner listens on all interfaces without credentials, waits forever when a worker dies, and takes seconds
to start. Here the local runner works in memory and opens no socket. A `DoFn` hands its elements to the pool and yields
the results, also inside the workers of any other runner.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import PCollection, TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue

from lodeset.pipeline.engines.failures import Failed, failed
from lodeset.pipeline.engines.processes import TRIES, Again, Died, Pool, Task, pool, task
from lodeset.pipeline.errors import LodesetError

# Handles an element whose worker died: (element, Died, again, *arguments of the function) -> results.
Rescue = Callable[..., Iterable[Any]]

# Number of worker processes of each Beam worker of the pipeline that is being built.
_workers = contextvars.ContextVar("workers", default=1)


def options(given: Mapping[str, str]) -> PipelineOptions:
    """Options for a cluster (as given), or for this machine.

    `FnApiRunner` is named explicitly because `DirectRunner` first tries to download and run an executable.
    """
    flags = [f"--{name}={value}" for name, value in given.items()]  # keeps this process's own arguments from Beam
    if "runner" in given:
        return PipelineOptions(flags)
    return PipelineOptions(flags, runner="FnApiRunner", direct_num_workers=1, direct_running_mode="in_memory")


@contextlib.contextmanager
def pipeline(cpus: int, given: Mapping[str, str]) -> Iterator[beam.Pipeline]:
    """A pipeline that runs when the block ends: on `cpus` processes of this machine or, if `given` names a runner, on
    one process in each of its workers.

    Raises:
        LodesetError: what `raise_failures` found. Runners pass a worker's exception on as the text of its traceback.
    """
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    before = _workers.set(1 if "runner" in given else cpus)
    try:
        with beam.Pipeline(options=options(given)) as built:
            yield built
    except Exception as error:
        raised = _RAISED.search(f"{type(error).__module__}.{type(error).__name__}: {error}") or _RAISED.search(
            str(error)
        )
        if raised is None:
            raise
        raise LodesetError(raised.group(1)) from error
    finally:
        _workers.reset(before)


_RAISED = re.compile(r"^lodeset\.pipeline\.errors\.\w+: (.*?)(?: \[while running [^\]]*\])?$", re.MULTILINE)


def attempted(
    items: PCollection[Any],
    label: str,
    function: Callable[..., Iterable[Any] | None],
    *arguments: Any,
    memory_bytes: int | None = None,
    rescue: Rescue | None = None,
) -> tuple[PCollection[Any], PCollection[Failed]]:
    """The results of `function(item, *arguments)` for every item, and its failures.

    A worker that uses more than `memory_bytes` is ended. If a worker dies, `rescue` decides; without it the item is
    tried again and finally becomes a failure. Nothing raises in a Beam worker, because runners retry that, and some
    wait forever.
    """
    work = _Elsewhere(label, function, arguments, memory_bytes, rescue or _retried, _workers.get())
    out = items | label >> beam.ParDo(work).with_outputs(_FAILED, main="results")
    return out["results"], out[_FAILED]


_FAILED = "failed"


class _Elsewhere(beam.DoFn):
    """Calls a function for every element in a pool of processes."""

    def __init__(
        self,
        label: str,
        function: Callable[..., Iterable[Any] | None],
        arguments: tuple[Any, ...],
        memory_bytes: int | None,
        rescue: Rescue,
        workers: int,
    ) -> None:
        self.label, self.function, self.arguments = label, function, arguments
        self.memory_bytes, self.rescue, self.workers = memory_bytes, rescue, workers
        self._running: list[tuple[Any, Task]] = []

    @property
    def _pool(self) -> Pool:
        return pool(self.workers)

    def _again(self, function: Callable[..., Iterable[Any] | None], *arguments: Any) -> list[Any] | Failed | Died:
        return self._pool.run(task(function, *arguments, memory_bytes=self.memory_bytes))

    def start_bundle(self) -> None:
        self._running = []

    def process(self, item: Any) -> Iterator[Any]:
        try:
            call = task(self.function, item, *self.arguments, memory_bytes=self.memory_bytes)
            self._pool.start(call)
            self._running.append((item, call))
        except Exception as error:
            yield TaggedOutput(_FAILED, failed(error))
        yield from self._ended(wait=False)

    def finish_bundle(self) -> Iterator[Any]:
        for value in self._ended(wait=True):
            if isinstance(value, TaggedOutput):
                yield TaggedOutput(value.tag, WindowedValue(value.value, MIN_TIMESTAMP, (GlobalWindow(),)))
            else:
                yield WindowedValue(value, MIN_TIMESTAMP, (GlobalWindow(),))

    def _ended(self, wait: bool) -> Iterator[Any]:
        """The results of the elements whose workers have answered; with `wait`, of all elements."""
        remaining = []
        for item, call in self._running:
            if call.result is None and not wait:
                remaining.append((item, call))
                continue
            try:
                result = self._pool.wait(call)
                if isinstance(result, Died):
                    result = list(self.rescue(item, result, self._again, self.function, *self.arguments))
            except Exception as error:
                result = failed(error)
            if isinstance(result, Failed):
                yield TaggedOutput(_FAILED, result)
            else:
                yield from result
        self._running = remaining


def _retried(item: Any, died: Died, again: Again, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    for _ in range(TRIES - 1):
        result = again(function, item, *arguments)
        if isinstance(result, list):
            return result
        if isinstance(result, Failed):
            raise LodesetError(result.message)
        died = result
    raise LodesetError(
        f"a worker process died {TRIES} times at the same work ({died.detail}): check the stage's log and the "
        "memory of the machine; run again to continue from the finished parts"
    )


def raise_failures(*failures: PCollection[Failed]) -> None:
    """Raise one of the failures, in one worker."""
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
