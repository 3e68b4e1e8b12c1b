"""What ingest makes of broken and malicious files, and of a decoder that crashes, hangs and fills memory at ten images.

    python benchmarks/hostile.py HOSTILE.tar POOL.tar [MUTATIONS]

HOSTILE.tar holds broken and crafted files. 2,000 images of POOL.tar go in as they are, and MUTATIONS (20,000) seeded
mutations of them. The decoder of ten of the 2,000 is made to end its process, to hang, or to take all memory. To show: these
ten are rejects, every other image of the 2,000 is in, every file is accounted for, and no worker holds more than its limit.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import random
import signal
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import cloudpickle
import psutil

from lodeset.pipeline.algorithms.images.decoding import Examined, Limits, Unreadable, examine, image_id
from lodeset.pipeline.config import Ingest, Source
from lodeset.pipeline.dag.stage import Context
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.graph import ingest_stage
from lodeset.pipeline.stages.ingest import run as ingest

CLEAN, DEADLY, WORKERS = 2_000, 10, 2
LIMITS = Ingest(max_seconds=3, worker_memory_gb=1.5, max_pixels=50_000_000, slice_mb=2)
EXPECTED = ("killed_decoder", "killed_decoder", "too_slow", "too_slow", "too_much_memory")


class Deadly:
    """A decoder that fails at the images it was told of."""

    def __init__(self, how: dict[str, int]) -> None:
        self.how = how

    def __call__(self, data: bytes, limits: Limits) -> Examined:
        how = self.how.get(hashlib.sha256(data).hexdigest()[:32])
        if how == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == 1:
            os.abort()
        if how == 2:
            time.sleep(10**6)
        while how == 3:
            pass
        kept = []
        while how == 4:
            kept.append(b"x" * 10**8)
        return examine(data, limits)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One of: bits flipped, a run overwritten, cut short, a piece repeated, a piece of zeros, two ends swapped."""
    raw = bytearray(data)
    kind, at = chance.randrange(6), chance.randrange(len(raw))
    length = min(len(raw) - at, chance.choice((1, 2, 4, 16, 64, 512)))
    if kind == 0:
        for _ in range(chance.choice((1, 2, 8, 64))):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        raw[at : at + length] = chance.randbytes(length)
    elif kind == 2:
        del raw[at:]
    elif kind == 3:
        raw[at:at] = raw[at : at + length] * chance.choice((1, 4, 1_000))
    elif kind == 4:
        raw[at : at + length] = bytes(length)
    else:
        raw = raw[at:] + raw[:at]
    return bytes(raw)


def images_of(path: str, count: int) -> list[bytes]:
    """The first images of a tar that decode, without repetition."""
    found: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None or len(found) == count:
                continue
            data = file.read()
            try:
                examine(data)
            except Unreadable:
                continue
            found.setdefault(image_id(data), data)
    return list(found.values())


def write(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def peak_of_workers(ended: threading.Event, peak: dict[str, int]) -> None:
    """The most that one process, and that all together, held (PSS, bytes)."""
    me = psutil.Process()
    while not ended.wait(0.05):
        sizes = []
        for process in me.children(recursive=True):
            try:
                sizes.append(process.memory_full_info().pss)
            except psutil.Error:
                continue
        peak["worker"] = max(peak["worker"], *sizes, 0) if sizes else peak["worker"]
        peak["all"] = max(peak["all"], sum(sizes))


def main() -> None:
    hostile, pool, *rest = sys.argv[1:]
    count = int(rest[0]) if rest else 20_000
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    chance = random.Random(0)
    clean = images_of(pool, CLEAN)
    deadly = {image_id(data): n % len(EXPECTED) for n, data in enumerate(chance.sample(clean, DEADLY))}
    with tempfile.TemporaryDirectory(prefix="lodeset-bench-") as folder:
        members = [(f"clean/{n:05}", data) for n, data in enumerate(clean)]
        members += [(f"mutated/{n:05}", mutated(chance.choice(clean), chance)) for n in range(count)]
        write(Path(folder) / "mutations.tar", members)
        store = Store(f"{folder}/store")
        stage = ingest_stage(LIMITS, {}, "pool", [Source(uri=f"{folder}/mutations.tar"), Source(uri=hostile)])
        ingest.examine = Deadly(deadly)  # what workers are sent
        ended, peak = threading.Event(), {"worker": 0, "all": 0}
        watch = threading.Thread(target=peak_of_workers, args=(ended, peak))
        watch.start()
        started = time.perf_counter()
        outcome = ingest.run(Context(store, stage, "hostile", {}, WORKERS, lambda _: None))
        seconds = time.perf_counter() - started
        ended.set()
        watch.join()
        kept = set(store.table(outcome.tables["images"], ["image_id"])["image_id"].to_pylist())
        rejects = store.table(outcome.tables["rejects"], ["uri", "member", "reason", "detail"]).to_pylist()
    ids = {f"clean/{n:05}": image_id(data) for n, data in enumerate(clean)}
    of_deadly = {row["member"]: row["reason"] for row in rejects if ids.get(row["member"]) in deadly}
    others = collections.Counter(
        row["reason"] for row in rejects if row["reason"] in EXPECTED and ids.get(row["member"]) not in deadly
    )
    wrong = {name: why for name, why in of_deadly.items() if why != EXPECTED[deadly[ids[name]]]}
    missing = set(ids.values()) - kept - set(deadly)
    print(
        json.dumps(
            {
                "files": outcome.rows.taken,
                "kept": outcome.rows.kept,
                "dropped": dict(outcome.rows.dropped),
                "balanced": outcome.rows.balanced(),
                "deadly_rejects": len(of_deadly),
                "wrong_reasons": wrong,
                "clean_images_missing": len(missing),
                "culprits_among_mutations_and_hostile": dict(others),
                "peak_pss_gib_of_a_worker": round(peak["worker"] / 2**30, 2),
                "peak_pss_gib_of_all_workers": round(peak["all"] / 2**30, 2),
                "limit_gib": LIMITS.worker_memory_gb,
                "seconds": round(seconds, 1),
            },
            indent=1,
        )
    )
    assert len(of_deadly) == DEADLY and not wrong and not missing and outcome.rows.balanced()
    assert peak["worker"] < LIMITS.worker_memory_gb * 2**30


if __name__ == "__main__":
    main()
