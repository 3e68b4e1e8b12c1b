"""What a run makes of a store in trouble: a full disk, a store that can only be read, one that is gone for 30 s, a clock that is set
back an hour, a flipped bit in a file of each kind. Each time: the exit code, the message, and whether the same command afterwards
makes the shards of a run that nobody disturbed.

It mounts file systems of its own, so it needs root on Linux.

python benchmarks/trouble.py
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from lodeset.infra.demo.world import make_world

IMAGES = 200
# Sets the time of day back by an hour in every process that starts after the file is there, and in running ones.
CLOCK = """
import os, time
_real = time.time
def _back():
    return _real() - (3600 if os.path.exists(os.environ.get("CLOCK_BACK", "/nowhere")) else 0)
time.time = _back
"""


def lodeset(*words: str | Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lodeset", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=900)
    assert "Traceback" not in err, err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    return process.returncode, (errors or [""])[-1][:300]


def shards(store: Path) -> dict[str, str]:
    found = sorted((store / "shards").glob("*/*"))
    return {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@contextlib.contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    # Processes of a run that has just been killed may still hold files open.
    for _ in range(60):
        done = subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return
        time.sleep(1)
    raise OSError(f"{folder} cannot be mounted again: {done.stderr}")


def until(store: Path, stage: str, parts: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and len(list((store / "parts" / stage).glob("*/manifest.json"))) < parts:
        time.sleep(0.05)


def main() -> None:
    rows: list[dict[str, object]] = []

    def told(trouble: str, store: Path, first: tuple[int, str], then: tuple[int, str]) -> None:
        rows.append(
            {
                "trouble": trouble,
                "exit": first[0],
                "message": first[1],
                "then": then[0],
                "same": shards(store) == expected,
            }
        )
        print(json.dumps(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory(prefix="lodeset-trouble-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        make_world(folder / "world", IMAGES, cpus=2)
        config = folder / "world/trouble.yaml"
        pool = [{"uri": "pool/*.tar"}, {"uri": "pool/loose/"}]
        config.write_text(
            yaml.safe_dump(
                {
                    "pool": pool,
                    "ingest": {"slice_mb": 0.25},
                    "dedup": {"calibration_images": 40},
                    "shards": {"size_mb": 1},
                }
            )
        )
        alone = folder / "alone"
        assert ended(lodeset("run", config, "--set", f"store={alone}"))[0] == 0
        expected = shards(alone)

        def run(store: Path, **environment: str) -> subprocess.Popen[str]:
            return lodeset("run", config, "--set", f"store={store}", environment=environment)

        disk = folder / "disk"
        with mounted(disk, 1):
            first = ended(run(disk / "store"))
            remount(disk, "size=300m")
            told("disk full", disk / "store", first, ended(run(disk / "store")))
        disk = folder / "read-only"
        with mounted(disk, 300):
            # Between two runs: a file system with a file open for writing cannot be made read-only.
            ended(lodeset("run", config, "--until", "ingest", "--set", f"store={disk / 'store'}"))
            remount(disk, "ro")
            first = ended(run(disk / "store"))
            remount(disk, "rw")
            told("store read-only after ingest", disk / "store", first, ended(run(disk / "store")))
            remount(disk, "ro")
            told("store read-only, everything finished", disk / "store", ended(run(disk / "store")), (0, ""))
            remount(disk, "rw")
        store = folder / "gone"
        process = run(store)
        until(store, "ingest", 2, process)
        store.rename(folder / "elsewhere")
        time.sleep(30)
        if store.exists():  # what the run made of it meanwhile
            store.rename(folder / "meanwhile")
        (folder / "elsewhere").rename(store)
        told("store gone for 30 s", store, ended(process), ended(run(store)))
        hook = folder / "hook"
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(CLOCK)
        store, back = folder / "clock", folder / "back"
        process = run(store, PYTHONPATH=str(hook), CLOCK_BACK=str(back))
        until(store, "ingest", 2, process)
        back.touch()
        told("clock back an hour", store, ended(process), ended(run(store, PYTHONPATH=str(hook), CLOCK_BACK=str(back))))
        rng = random.Random(0)
        for kind in (
            "parts/*/*/*.parquet",
            "parts/*/*/manifest.json",
            "artifacts/*/*/*/manifest.json",
            "shards/*/*.tar",
            "runs/*.json",
        ):
            path = rng.choice(sorted(alone.glob(kind)))
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            first = ended(lodeset("verify", config, "--deep", "--set", f"store={alone}"))
            told(f"a flipped bit in {kind}", alone, first, ended(run(alone)))


if __name__ == "__main__":
    main()
