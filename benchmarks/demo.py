"""Wall time and peak memory (summed PSS of all its processes, sampled twice a second) of `lodeset demo`.

python benchmarks/demo.py
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

import psutil

MARK = "LODESET_BENCH_RUN"


def pss_bytes(mark: str) -> int:
    total = 0
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main() -> None:
    folder, mark, peak = tempfile.mkdtemp(prefix="lodeset-demo-"), uuid.uuid4().hex, 0
    started = time.perf_counter()
    command = [sys.executable, "-m", "lodeset", "demo", f"{folder}/demo", "--json"]
    with subprocess.Popen(command, env={**os.environ, MARK: mark}, stdout=subprocess.PIPE, text=True) as run:
        while run.poll() is None:
            peak = max(peak, pss_bytes(mark))
            time.sleep(0.5)
        assert run.stdout is not None
        result = json.load(run.stdout)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    print(
        json.dumps(
            {
                "benchmark": "demo",
                "seconds": round(seconds, 1),
                "peak_pss_gib": round(peak / 2**30, 2),
                "asked": "<= 360 s, <= 4 GiB",
                "exit": run.returncode,
                "lines": result["lines"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
