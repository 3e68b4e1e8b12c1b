"""A hundred scheduled runs on a pool that grows each time: time and memory of each, open files, growth of the store, and what
`lodeset gc` makes of it.

Each run is a process of its own, as a scheduler starts it. Every tenth, the store is collected (`--keep 10`), and the sums of its
classes are compared with the bytes on disk.

python benchmarks/scheduled.py [RUNS] [IMAGES_EACH]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import yaml

from lodeset.infra.demo.world import make_world

MARK = "LODESET_BENCH_RUN"


def measured(command: list[str]) -> tuple[float, int, int]:
    """Seconds, and the peaks of proportional set size (bytes) and of open files over all processes of a command."""
    mark, peak, files = uuid.uuid4().hex, 0, 0
    began = time.monotonic()
    with subprocess.Popen(
        command, env={**os.environ, MARK: mark}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as done:
        while done.poll() is None:
            total = opened = 0
            for process in psutil.process_iter():
                try:
                    if process.environ().get(MARK) == mark:
                        total += process.memory_full_info().pss
                        opened += process.num_fds()
                except psutil.Error:
                    continue
            peak, files = max(peak, total), max(files, opened)
            time.sleep(0.5)
        assert done.stderr is not None
        assert done.returncode == 0, done.stderr.read().decode()[-2000:]
    return time.monotonic() - began, peak, files


def on_disk(store: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in store.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def main() -> None:
    runs, each = (int(word) for word in (*sys.argv[1:], "100", "20")[:2])
    with tempfile.TemporaryDirectory(prefix="lodeset-scheduled-") as name:
        folder = Path(name)
        make_world(folder / "world", max(200, runs * each), cpus=2)
        images = sorted(p for p in (folder / "world/pool/loose").rglob("*") if p.is_file())
        tars = sorted((folder / "world/pool").glob("*.tar"))
        (folder / "pool").mkdir()
        for tar in tars[:1]:
            shutil.copy2(tar, folder / "pool")
        config = folder / "lodeset.yaml"
        config.write_text(
            yaml.safe_dump({"pool": ["pool/"], "dedup": {"calibration_images": 40}, "shards": {"size_mb": 1}})
        )
        lodeset = [sys.executable, "-m", "lodeset"]
        per_run = max(1, len(images) // runs)
        rows = []
        for number in range(runs):
            new = folder / "pool" / f"day-{number:03d}"
            new.mkdir()
            for path in images[number * per_run : (number + 1) * per_run]:
                shutil.copy2(path, new)
            seconds, peak, files = measured([*lodeset, "run", str(config)])
            count, size = on_disk(folder / "runs")
            row = {"run": number + 1, "seconds": round(seconds, 1), "pss_mib": peak >> 20, "open_files": files, "store_files": count,
                   "store_bytes": size}  # fmt: skip
            if (number + 1) % 10 == 0:
                told = subprocess.run(
                    [*lodeset, "gc", str(config), "--keep", "10", "--older-than", "0", "--json"],
                    capture_output=True,
                    check=True,
                )
                gone = json.loads(told.stdout)
                accounted = sum(kind["size_bytes"] for kind in gone["kinds"])
                row |= {
                    "gc_files": len(gone["files"]),
                    "gc_bytes": sum(file["size_bytes"] for file in gone["files"]),
                    "unaccounted_bytes": size - accounted,
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    first, last = rows[: max(1, runs // 10)], rows[-max(1, runs // 10) :]
    for key in ("seconds", "pss_mib", "open_files"):
        print(key, [round(sum(row[key] for row in some) / len(some), 1) for some in (first, last)])


if __name__ == "__main__":
    main()
