"""Ingest against a plain two-process loop that does the same decoding and hashing (engine start apart).

    python benchmarks/ingest.py POOL.tar [ROUNDS]

One run, interleaved: loop, ingest of one image (engine start), ingest of the pool; medians over the rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from lodeset.pipeline.algorithms.images.decoding import Unreadable, examine
from lodeset.pipeline.config import Ingest, Source
from lodeset.pipeline.dag.stage import Context
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.graph import ingest_stage
from lodeset.pipeline.stages.ingest import run as ingest

WORKERS = 2
LIMITS = Ingest(slice_mb=4)


def _half(job: tuple[str, int]) -> int:
    path, half = job
    done = 0
    with tarfile.open(path) as tar:
        members = [m for m in tar if m.isfile()]
        for member in members[half * len(members) // WORKERS : (half + 1) * len(members) // WORKERS]:
            file = tar.extractfile(member)
            assert file is not None
            try:
                examine(file.read())
            except Unreadable:
                continue
            done += 1
    return done


def loop_seconds(path: str) -> float:
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        started = time.perf_counter()
        pool.map(_half, [(path, half) for half in range(WORKERS)])
        return time.perf_counter() - started


def ingest_seconds(path: str) -> float:
    folder = tempfile.mkdtemp(prefix="lodeset-bench-")
    try:
        store = Store(folder)
        stage = ingest_stage(LIMITS, {}, "pool", [Source(uri=path)])
        started = time.perf_counter()
        ingest.run(Context(store, stage, "0" * 64, {}, WORKERS, lambda _: None))
        return time.perf_counter() - started
    finally:
        shutil.rmtree(folder)


def one_image(path: str, folder: str) -> str:
    """A tar of the first image, to time what the engine itself takes."""
    small = str(Path(folder) / "one.tar")
    with tarfile.open(path) as tar, tarfile.open(small, "w") as out:
        first = next(m for m in tar if m.isfile())
        out.addfile(first, tar.extractfile(first))
    return small


def main() -> None:
    path, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as folder:
        small = one_image(path, folder)
        ingest_seconds(small)  # warm-up
        times: dict[str, list[float]] = {"loop": [], "engine_start": [], "ingest": []}
        for _ in range(rounds):
            times["loop"].append(loop_seconds(path))
            times["engine_start"].append(ingest_seconds(small))
            times["ingest"].append(ingest_seconds(path))
    median = {name: round(statistics.median(t), 3) for name, t in times.items()}
    ratio = (median["ingest"] - median["engine_start"]) / median["loop"]
    print(
        json.dumps(
            {"benchmark": "ingest", "seconds": median, "all": times, "ratio": round(ratio, 3), "asked": "<= 2.0"}
        )
    )


if __name__ == "__main__":
    main()
