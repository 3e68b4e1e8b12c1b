"""Stages that do next to nothing, importable by child processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa

from lodeset.pipeline.dag.child import ray_on_demand
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context, Outcome, Progress
from lodeset.pipeline.dag.store import File, Rows
from lodeset.pipeline.errors import GateError, LodesetError, source_replaced


def count(context: Context) -> Outcome:
    """One row more than the inputs have together."""
    rows = 1 + sum(a.rows.kept for a in context.inputs.values())
    context.report(Progress(0.5, rows))
    part = context.store.commit_part("toy", context.fingerprint, {"rows": pa.table({"x": list(range(rows))})})
    return Outcome(
        {"rows": (part.files["rows"],)}, Rows(rows, rows), content={"images": "same"}, details={"cpus": context.cpus}
    )


def with_shard(context: Context) -> Outcome:
    """`count`, and a file that lies apart from its part, under a name that is not of one attempt alone."""
    counted = count(context)
    with context.store.writing("shards/toy/shard-000000.tar") as sink:
        sink.write(context.fingerprint.encode() * 40)
    file = File("shards/toy/shard-000000.tar", 1, sink.size_bytes, sink.sha256())
    part = context.store.commit_part("toy_shard", context.fingerprint, {}, files={"shard": file})
    return Outcome({**counted.tables, "shards": (part.files["shard"],)}, counted.rows, counted.content)


def sleepy(context: Context) -> Outcome:
    started = time.time()
    time.sleep(1.0)
    return Outcome({}, Rows(0, 0), details={"started": started, "ended": time.time()})


def ends_its_parent(context: Context) -> Outcome:
    """Ends the process that forked it, which is none of the runner's own."""
    parent = os.getppid()
    forked = b"pipeline.dag.forking" in Path(f"/proc/{parent}/cmdline").read_bytes()
    if forked:
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)
    return Outcome({}, Rows(0, 0), details={"forked": forked})


def tells_its_environment(context: Context) -> Outcome:
    printed = subprocess.run(["printenv", "LODESET_TOLD"], capture_output=True, text=True, check=True).stdout.strip()
    return Outcome({}, Rows(0, 0), details={"told": [os.environ["LODESET_TOLD"], printed]})


def asks_for_ray(context: Context) -> Outcome:
    address = ray_on_demand()
    return Outcome({}, Rows(0, 0), details={"address": address, "told": os.environ["LODESET_TOLD"]})


def host(context: Context) -> Outcome:
    """Tells which stages it could do work for, and what these would be given."""
    guests = {c.stage.id: [c.fingerprint, sorted(c.inputs), c.previous is not None] for c in context.also}
    return Outcome({}, Rows(1, 1), details={"guests": guests})


def goes_on(context: Context) -> Outcome:
    previous = context.previous
    return Outcome({}, Rows(1, 1), details={"from": None if previous is None else previous.fingerprint})


def loses_rows(context: Context) -> Outcome:
    return Outcome({}, Rows(10, 7, {"near": 2}))


def user_error(context: Context) -> Outcome:
    raise LodesetError("the pool is dry: add water")


def meets_other_bytes(context: Context) -> Outcome:
    raise source_replaced("/pool/a (1).png", " at 0: image a expected, b found")


def gate(context: Context) -> Outcome:
    raise GateError("too large")


def defect(context: Context) -> Outcome:
    raise ZeroDivisionError("oops")


def engine_defect(context: Context) -> Outcome:
    raise RuntimeError("worker 3 failed\nTraceback (most recent call last):\n  File x, line 1\nKeyError: 'vector'\n")


def dies(context: Context) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def leaves_a_process(context: Context) -> Outcome:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return Outcome({}, Rows(0, 0), details={"pid": left.pid})


def reads(context: Context) -> Outcome:
    """A file of the pool is a part."""
    keys = [digest("read", n) for n in range(context.spec["size"])]
    there = context.store.committed("read", keys)
    for n, key in enumerate(keys):
        if key not in there:
            context.store.commit_part("read", key, {"rows": pa.table({"x": [n]})})
    parts = context.store.committed("read", keys)
    return Outcome({"rows": tuple(parts[key].files["rows"] for key in keys)}, Rows(len(keys), len(keys)))


def compares(context: Context) -> Outcome:
    """Keeps a part for each file, and lists none of them: its table is what they come to."""
    files = context.inputs["pool"].tables["rows"]
    keys = [digest("compare", file.sha256) for file in files]
    there = context.store.committed("compare", keys)
    for key in keys:
        if key not in there:
            context.store.commit_part("compare", key, {"found": pa.table({"key": [key]})})
    total = context.store.commit_part("compared", context.fingerprint, {"total": pa.table({"x": [len(keys)]})})
    return Outcome({"total": (total.files["total"],)}, Rows(len(keys), len(keys)))
