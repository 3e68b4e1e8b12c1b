"""One new tar on a pool of 20: what a run over the grown pool reads, embeds, searches and writes.

    python benchmarks/growth.py FOLDER        FOLDER: world/pool.tar, weights/mobilenet_v2.onnx

The pool is cut into 21 tars of about the same number of images; everything that dedup keeps goes into shards. Three runs: over
20 tars, over 21, and over 21 from scratch in a store of its own, whose groups of copies are compared with those of the second.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import yaml

TARS = 21


def split(pool: Path, folder: Path) -> list[int]:
    """The pool as so many tars; the images of each."""
    with tarfile.open(pool) as source:
        members = [member for member in source if member.isfile()]
        # Members of one sample lie together; a cut between two stems parts none.
        stems = sorted({member.name.partition(".")[0] for member in members})
        tar_of = {stem: n * TARS // len(stems) for n, stem in enumerate(stems)}
        outs = [tarfile.open(folder / f"part-{n:02d}.tar", "w") for n in range(TARS)]  # noqa: SIM115
        for member in members:
            outs[tar_of[member.name.partition(".")[0]]].addfile(member, source.extractfile(member))
        for out in outs:
            out.close()
    return [sum(n == tar for n in tar_of.values()) for tar in range(TARS)]


def run(config: Path) -> tuple[float, dict[str, dict[str, Any]]]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "lodeset", "run", str(config), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    artifacts = json.loads(done.stdout)["artifacts"]
    return time.perf_counter() - started, {f"{a['stage']}/{a['set']}": a for a in artifacts}


def groups(by_id: dict[str, dict[str, Any]]) -> dict[str, str]:
    table = ds.dataset(by_id["dedup/pool"]["tables"]["duplicates"]).to_table(columns=["image_id", "group_id"])
    return dict(zip(table["image_id"].to_pylist(), table["group_id"].to_pylist(), strict=True))


def main() -> None:
    data = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory(prefix="lodeset-growth-") as name:
        folder = Path(name)
        (folder / "pool").mkdir()
        images = split(data / "world/pool.tar", folder / "pool")
        (folder / "pool/part-20.tar").rename(folder / "part-20.tar")
        tree = {
            "store": "./runs",
            "pool": [{"uri": "pool/*.tar"}],
            "embed": {"semantic": {"kind": "onnx", "path": str(data / "weights/mobilenet_v2.onnx")}},
            "shards": {"size_mb": 4},
        }
        config, scratch = folder / "lodeset.yaml", folder / "scratch.yaml"
        config.write_text(yaml.safe_dump(tree))
        scratch.write_text(yaml.safe_dump({**tree, "store": "./scratch"}))
        first_s, first = run(config)
        (folder / "part-20.tar").rename(folder / "pool/part-20.tar")
        second_s, second = run(config)
        whole_s, whole = run(scratch)
        shards = second["write_shards/all"]["details"]
        share = first["write_shards/all"]["details"]["size_bytes"] * images[-1] / sum(images[:-1])
        again, anew = groups(second), groups(whole)
        result = {
            "benchmark": "growth",
            "images": {"pool": sum(images[:-1]), "new": images[-1]},
            "decoded": second["ingest/pool"]["details"]["images_decoded"],
            "embedded": second["embed/pool"]["details"]["images_embedded"],
            "shard_bytes": {"written": shards["written_bytes"], "share": round(share), "asked": "<= 2.0 of its share"},
            "ratio": round(shards["written_bytes"] / share, 3),
            "seconds": {
                "pool": round(first_s, 1),
                "one more tar": round(second_s, 1),
                "from scratch": round(whole_s, 1),
            },
            "stage_seconds": {
                id_: [run_[id_]["seconds"] for run_ in (first, second, whole)] for id_ in second if id_ in first
            },
            "since": shards["since"],
            "images_in_other_groups_than_from_scratch": sum(group != anew[i] for i, group in again.items()),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
