"""What checking digests costs each stage of a run, as a share of its time.

    python benchmarks/digests.py demo/lodeset.yaml

Every process writes down when it compared something with its digest (a file: `Store.check` and `Store.bytes_of`; an image of a
shard: `image_id` in `training.index`) and how long that took. The run has one core, so that one stage is at work at a time, and
a new store.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from lodeset.pipeline.dag.damage import contents
from lodeset.pipeline.dag.store import Store

HOOK = """
import importlib.abc, importlib.machinery, os, sys, time

WRAPPED = {"lodeset.pipeline.dag.store": ("Store.check", "Store.bytes_of"), "lodeset.training.index": ("image_id",)}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in WRAPPED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for dotted in WRAPPED[name]:
                *owners, last = dotted.split(".")
                owner = getattr(module, owners[0]) if owners else module
                setattr(owner, last, timed(getattr(owner, last)))

        spec.loader.exec_module = exec_module
        return spec


def timed(inner):
    def outer(*arguments, **named):
        started = time.perf_counter()
        try:
            return inner(*arguments, **named)
        finally:
            with open(f"{os.environ['LODESET_DIGEST_TIMES']}/{os.getpid()}", "a") as file:
                file.write(f"{time.time()} {time.perf_counter() - started}\\n")

    return outer


if "LODESET_DIGEST_TIMES" in os.environ:
    sys.meta_path.insert(0, Finder())
"""


def main(config: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("hook", "times"):
            (folder / name).mkdir()
        (folder / "hook/sitecustomize.py").write_text(HOOK)
        copy = config.with_name("digests-benchmark.yaml")
        copy.write_text(yaml.safe_dump({**tree, "store": str(folder / "store"), "resources": {"cpus": 1}}))
        path = os.pathsep.join([str(folder / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "LODESET_DIGEST_TIMES": str(folder / "times")}
        try:
            subprocess.run([sys.executable, "-m", "lodeset", "run", str(copy)], env=environment, check=True)
        finally:
            copy.unlink()
        report(Store(str(folder / "store")), folder / "times")


def report(store: Store, folder: Path) -> None:
    lines = [line.split() for file in folder.iterdir() for line in file.read_text().splitlines()]
    checks = [(float(when), float(seconds)) for when, seconds in lines]
    for one in sorted(contents(store).artifacts, key=lambda one: one.created):
        own = [seconds for when, seconds in checks if one.created - one.seconds <= when <= one.created]
        share = 100 * sum(own) / one.seconds
        print(f"{one.id:<20} {one.seconds:8.1f} s  {len(own):6} checks  {sum(own):7.3f} s  {share:6.2f} %")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
