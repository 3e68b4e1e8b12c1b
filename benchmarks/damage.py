"""A seeded bit flip in every table, shard and manifest of a store: is each found, and is the store made whole again?

    lodeset demo demo && python benchmarks/damage.py demo/lodeset.yaml

Works on the store itself, so give it one that can be spared. First every file is flipped and put back, one by one: a flip counts as
found if the reader of that file, or `verify --deep`, names the file. Then all of them are flipped at once, `lodeset run` is
started, and digests are compared with those before.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from lodeset.infra.config import read
from lodeset.infra.upkeep.damage import verify
from lodeset.pipeline.dag.damage import changed, contents
from lodeset.pipeline.dag.store import DAMAGED, Store

FOLDERS = ("parts", "artifacts", "shards", "pruned", "training", "runs")


def flip(path: Path, generator: random.Random) -> bytes:
    """Flips a bit without touching size or time; what was there before."""
    before, status = path.read_bytes(), path.stat()
    data, bit = bytearray(before), generator.randrange(len(before) * 8)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return before


def kind(path: Path) -> str:
    return (
        "manifest" if path.name == "manifest.json" else path.suffix.lstrip(".") if path.parent.name != "runs" else "run"
    )


def digests(store: Store) -> dict[str, str]:
    """Of every listed file, by what it is rather than by the attempt that wrote it."""
    held = contents(store)
    of_parts = {
        f"{stage} {part.key} {name}": file.sha256 for stage, part in held.parts for name, file in part.files.items()
    }
    loose = {
        file.path: file.sha256 for one in held.artifacts for file in one.files() if file.path.startswith("training/")
    }
    return of_parts | loose


def main(config: Path) -> None:
    store, generator = Store(read(config).store), random.Random(0)
    held = contents(store)
    listed = {file.path: file for file in held.files()}
    files = [p for folder in FOLDERS for p in sorted(Path(store.path(folder)).rglob("*")) if p.is_file()]
    own = [p for folder in ("parts", "artifacts", "runs") for p in Path(store.path(folder)).rglob("*.json")]
    known = [p for p in files if p.relative_to(store.root).as_posix() in listed or p in own]
    before, flipped, found = digests(store), Counter[str](), Counter[str]()
    for path in known:
        relative = path.relative_to(store.root).as_posix()
        whole = flip(path, generator)
        file = listed.get(relative)
        named = {one.path for one in (changed(store, [file]) if file is not None else contents(store).damage)}
        flipped[kind(path)] += 1
        found[kind(path)] += relative in named
        path.write_bytes(whole)
        shutil.rmtree(store.path(DAMAGED), ignore_errors=True)
    for name in sorted(flipped):
        print(f"{name}: {found[name]} of {flipped[name]} flips found")
    print(f"{len(files) - len(known)} files that no manifest lists (other checkpoints, curves), left alone")
    for path in known:
        flip(path, generator)
    started = time.perf_counter()
    print(
        f"all flipped: verify names {len(verify(store, deep=True).damage)} files in {time.perf_counter() - started:.1f} s"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "lodeset", "run", str(config)], capture_output=True, text=True)
    print(f"`lodeset run` ended with {done.returncode} after {time.perf_counter() - started:.0f} s")
    after = verify(store, deep=True)
    now = digests(store)
    same = sum(now.get(name) == digest for name, digest in before.items())
    print(f"verify names {len(after.damage)} files; {same} of {len(before)} files have the digests that they had")
    for name in sorted(set(before) - set(now))[:20]:
        print(f"  gone: {name}")
    for name in sorted(name for name in before if name in now and now[name] != before[name]):
        print(f"  other: {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
