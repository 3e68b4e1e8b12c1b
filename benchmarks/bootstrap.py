"""A model that curates its own data: curate with a weak embedder, train on what it chose, curate again with the trained model.

    python benchmarks/bootstrap.py FOLDER [STEPS]

FOLDER: as for `world.py` (world/pool.tar, world/queries/q_*.tar, judge.py), and world/targets.parquet. Two runs on one store:
the default patch dictionary, then the checkpoint that the first run trained (`training.recipe: tiny`), read through its
export. Both are judged alike; the second trains nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from world import files, lodeset


def judged(data: Path, artifacts: list[dict[str, Any]]) -> list[str]:
    """What the judge says of the hits of every set."""
    command = [sys.executable, str(data / "judge.py"), "selected", *files(artifacts, "retrieve", "matches")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def summary(artifacts: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    by_id = {f"{a['stage']}/{a['set']}": a for a in artifacts}
    told = {id_: by_id[id_]["details"] for id_ in ("calibrate/pool", "evaluate/all")}
    return {
        "seconds": round(seconds, 1),
        "stages": {id_: a["seconds"] for id_, a in by_id.items() if a["set"] in ("pool", "all")},
        "images_embedded": by_id["embed/pool"]["details"]["images_embedded"],
        "survive dedup": by_id["dedup/pool"]["rows"]["kept"],
        "selected": by_id["retrieve/all"]["rows"]["kept"],
        "thresholds": told["calibrate/pool"]["candidates"],
        "knn": {name: target["knn"] for name, target in told["evaluate/all"]["targets"].items()},
    }


def main() -> None:
    data = Path(sys.argv[1]).resolve()
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 400
    with tempfile.TemporaryDirectory(prefix="lodeset-bootstrap-") as folder:
        queries = sorted((data / "world/queries").glob("q_*.tar"))
        tree: dict[str, Any] = {
            "store": "./runs",
            "pool": [{"uri": str(data / "world/pool.tar")}],
            "curated": [
                {"name": q.stem.removeprefix("q_"), "uri": str(q), "retrieve": {"mode": "sample", "k": 10}}
                for q in queries
            ],
            "targets": [{"name": "targets", "uri": str(data / "world/targets.parquet")}],
            "ingest": {"slice_mb": 4},
            "shards": {"size_mb": 16},
            "training": {"recipe": "tiny", "steps": steps},
        }
        for name in ("patch dictionary", "own checkpoint"):
            config = Path(folder) / f"{name.split()[0]}.yaml"
            config.write_text(yaml.safe_dump(tree))
            started = time.perf_counter()
            artifacts = lodeset("run", str(config))["artifacts"]
            figures = summary(artifacts, time.perf_counter() - started)
            print(f"== {name}", json.dumps(figures), *judged(data, artifacts), sep="\n", flush=True)
            if "training" in tree:
                (model,) = (f for f in files(artifacts, "train", "model") if f.endswith("model.safetensors"))
                tree["embed"] = {"semantic": {"kind": "huggingface", "model": str(Path(model).parent)}}
                del tree["training"]


if __name__ == "__main__":
    main()
