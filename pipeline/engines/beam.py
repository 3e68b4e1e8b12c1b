"""Apache Beam: the local runner by name, any other by options alone."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions


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
    """A pipeline that is run when the block ends."""
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    os.environ.setdefault("TMPDIR", "/tmp")
    with beam.Pipeline(options=options(cpus, given)) as made:
        yield made
