"""The dashboard on a store of 1,000,000 images: what it takes to make, how soon pages answer, and what the server holds.

    python benchmarks/dashboard.py [IMAGES] [FOLDER]

The store is drawn (`tests/inspected_world.py`): tables only, two runs over the same images. The command line makes what pages read; then a
server of its own is asked for every page, three times each, and the slowest answer counts. Prints a table.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from inspected_world import make

LASSO = "-0.08,-0.08;0.08,-0.08;0.08,0.08;-0.08,0.08"
PAGES = (
    "/", "/duplicates", "/duplicates/groups", "/duplicates/leaks", "/audit", "/map", "/images", "/clusters", "/clusters/5", "/retrieval",
    "/shards", "/training", "/commit?setting=min_score&value=5.2",
)  # fmt: skip
# What is asked for, and how often it must be asked for one view.
PARTS = {
    "slider step": ["/duplicates/line?setting=min_score&value={value}"],
    "density picture of the map": ["/map/density.webp"],
    "all points: x, y and one color": ["/map/columns/x.bin", "/map/columns/y.bin", "/map/columns/outcome.bin"],
    "lasso: which points": [f"/map/mask.bin?lasso={LASSO}"],
    "lasso: gallery and legend": [f"/map/selected?lasso={LASSO}"],
    "two runs image by image": ["/diff?run=2&with=1"],
}


def lodeset(*words: object) -> list[str]:
    return [sys.executable, "-m", "lodeset", *map(str, words)]


def main(images: int, folder: Path) -> None:
    config = folder / "lodeset.yaml"
    if not config.exists():
        for decided in (None, 1):
            make(folder, images, decided=decided)
    print("| what | seconds |\n| --- | --- |")
    for run in (1, 2):
        began = time.monotonic()
        subprocess.run(
            lodeset("inspect", config, "--run", run, "--make-only", "--no-thumbnails"), check=True, capture_output=True
        )
        print(f"| making what pages read, run {run} | {time.monotonic() - began:.1f} |", flush=True)
    command = lodeset("inspect", config, "--run", 2, "--no-thumbnails", "--no-open")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        began = time.monotonic()
        found = re.match(r"(http://[^/]+)/\?token=(\S+)", server.stdout.readline())
        assert found is not None
        address, token = found.groups()
        print(f"| until the server answers | {time.monotonic() - began:.1f} |", flush=True)
        peak = 0
        try:
            for path in PAGES:
                _, first, rest = _asked(address, token, [path] * 3)
                print(f"| {path} | {first:.2f}, then {rest:.2f} |", flush=True)
                peak = max(peak, psutil.Process(server.pid).memory_full_info().uss)
            for what, paths in PARTS.items():
                size, first, rest = 0, 0.0, 0.0
                for path in paths:
                    asked = _asked(address, token, [path.format(value=value) for value in (3.0, 3.7, 4.4, 5.1, 6.3)])
                    size, first, rest = size + asked[0], first + asked[1], rest + asked[2]
                print(f"| {what} ({size / 1e6:.1f} MB) | {first:.2f}, then {rest:.2f} |", flush=True)
                peak = max(peak, psutil.Process(server.pid).memory_full_info().uss)
            print(f"| private memory of the server, MiB | {peak / 2**20:,.0f} |")
        finally:
            server.terminate()


def _asked(address: str, token: str, paths: list[str]) -> tuple[int, float, float]:
    """Bytes of the last answer, and seconds of the first and of the slowest other one."""
    seconds, size = [], 0
    for path in paths:
        began = time.monotonic()
        request = urllib.request.Request(
            address + path, headers={"Authorization": f"Bearer {token}", "Accept": "text/html, */*"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            size = len(answer.read())
        seconds.append(time.monotonic() - began)
    return size, seconds[0], max(seconds[1:]) if len(seconds) > 1 else statistics.fmean(seconds)


if __name__ == "__main__":
    given = sys.argv[1:]
    wanted = int(given[0]) if given else 1_000_000
    with tempfile.TemporaryDirectory() as made:
        main(wanted, Path(given[1]) if len(given) > 1 else Path(made) / "world")
