"""Apache Beam: the local runner by name, any other by options alone."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.errors import LodesetError

_RAISED = re.compile(r"^pipeline\.errors\.\w+: (.*?)(?: \[while running [^\]]*\])?$", re.MULTILINE)


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
        LodesetError: what a worker raised. Runners hand over exceptions of workers as the text of their traceback.
    """
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    os.environ.setdefault("TMPDIR", "/tmp")
    try:
        with beam.Pipeline(options=options(cpus, given)) as made:
            yield made
    except Exception as error:
        told = _RAISED.search(str(error)) or _RAISED.search(f"{type(error).__module__}.{type(error).__name__}: {error}")
        if told is None:
            raise
        raise LodesetError(told.group(1)) from error
