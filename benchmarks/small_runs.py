"""Runs over a pool that has grown by a handful of images: seconds of wall time and of the processor, by stage.

python benchmarks/small_runs.py IMAGES [SET=VALUE ...]     e.g. resources.ray.in_place_s=0: all work by Ray

The first run curates IMAGES images of the sample world, drawn once. Then three runs find 8 new images each, and one finds nothing new.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from lodeset.infra.demo.world import make_world

NEW, RUNS = 8, 3


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall time and processor time of a command and of what it waited for."""
    before, began = os.times(), time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after, wall = os.times(), time.monotonic() - began
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    images, *settings = sys.argv[1:]
    changed = [word for setting in settings for word in ("--set", setting)]
    with tempfile.TemporaryDirectory(prefix="lodeset-small-") as name:
        folder = Path(name)
        make_world(folder / "world", int(images), cpus=2)
        apart = sorted(p for p in (folder / "world/pool/loose").rglob("*") if p.is_file())[: NEW * RUNS]
        for path in apart:
            shutil.move(path, folder / path.name)
        config = folder / "lodeset.yaml"
        sets = {
            "reference": [{"name": "held-out", "uri": "world/reference/"}],
            "curated": [{"name": "alpha", "uri": "world/curated/alpha.tar", "retrieve": {"mode": "sample", "k": 4}}],
        }
        config.write_text(yaml.safe_dump({"pool": ["world/pool/"], **sets, "shards": {"size_mb": 1}}))
        lodeset = [sys.executable, "-m", "lodeset"]
        print("| run | wall s | processor s | stages |")
        print("| --- | --- | --- | --- |")
        for number in range(RUNS + 2):
            if 0 < number <= RUNS:
                for path in apart[NEW * (number - 1) : NEW * number]:
                    shutil.move(folder / path.name, path)
            began = time.time()
            wall, processor = seconds([*lodeset, "run", str(config), *changed])
            status = subprocess.run([*lodeset, "status", str(config), "--json"], check=True, capture_output=True)
            artifacts = [one for one in json.loads(status.stdout)["artifacts"] if one["finished"]]
            made = [one for one in artifacts if Path(one["manifest"]).stat().st_mtime > began]
            told = ", ".join(f"{one['stage']}/{one['set']} {one['seconds']:.1f}" for one in made)
            what = "first" if number == 0 else "nothing new" if number > RUNS else f"{NEW} new"
            print(f"| {what} | {wall:.1f} | {processor:.1f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
