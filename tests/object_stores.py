"""A small world with training and a pruning job, run on different stores; and what such a run makes, to compare."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from commands import typed

from lodeset.infra.demo.world import make_world, write_config
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.remote.file_system import file_system

_ATTEMPT, _KEY = re.compile(r"^[0-9a-f]{12}-"), re.compile(r"(?<=-distilled)-[0-9a-f]{8}(?=/)")
# Made alike by every run: shards with their index, the trained model, the pruned ones.
TABLES = {"write_shards/all": ("shards", "index"), "train/all": ("model",), "prune/all": ("models",)}
IMAGES = 200
# 5 % in all, by kind of fault (`fault_proxy.py`).
RATES = {
    "slow_down": 0.015,
    "cut": 0.01,
    "short": 0.005,
    "reset": 0.005,
    "lost": 0.005,
    "silence": 0.005,
    "late": 0.005,
}


def world(folder: Path, images: int = IMAGES, recover: bool = False) -> Path:
    """The sample world with few steps; returns its configuration. With `recover`, pruned models are trained again."""
    make_world(folder, images)
    path = write_config(folder, images)
    tree = yaml.safe_load(path.read_text())
    for key in ("targets", "curated", "reference"):  # more stages of the same kinds
        del tree[key]
    tree["ingest"] = {"slice_mb": 0.5}
    tree["dedup"] = {"calibration_images": 40}
    tree["shards"] = {"size_mb": 0.1}
    tree["training"] |= {"steps": 8, "batch": 8, "checkpoint_every": 4, "log_every": 2, "precision": "fp32"}
    tree["training"]["model"] = {"dim": 32, "depth": 2, "heads": 2}
    job: dict[str, Any] = {"method": "entropic", "remove": [0.3], "calibration_images": 64}
    tree["pruning"] = [job | ({"recover": {"steps": 4, "how": "distill"}} if recover else {})]
    tree["resources"] = {"cpus": 2}
    path.write_text(yaml.safe_dump(tree))
    return path


def placed(config: Path, name: str, store: str, sources: str = "") -> Path:
    """The same configuration with another store and, below a URL, other sources."""
    tree = yaml.safe_load(config.read_text())
    tree["store"] = store
    if sources:
        for one in tree["pool"]:
            one["uri"] = f"{sources}/{one['uri']}"
    path = config.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def copied_to(config: Path, url: str) -> None:
    """The files of the world, below a URL."""
    fs, root = file_system(url)
    for path in config.parent.rglob("*"):
        relative = path.relative_to(config.parent)
        if path.is_file() and relative.parts[0] == "pool":
            fs.pipe_file(f"{root}/{relative.as_posix()}", path.read_bytes())


@dataclass(frozen=True)
class Made:
    """What a run left, and what it told."""

    seconds: float
    digests: Mapping[str, list[str]]  # of files, by table and name
    weights: Mapping[str, str]  # of the tensors of the last checkpoint
    told: str


def run(config: Path) -> Made:
    started = time.monotonic()
    code, _, err = typed("run", config)
    assert code == 0, err
    seconds = time.monotonic() - started
    url = yaml.safe_load(config.read_text())["store"]
    store = Store(url if "://" in url else str(config.parent / url))
    last = store.run(store.run_numbers()[-1])
    digests: dict[str, list[str]] = {}
    weights: dict[str, str] = {}
    for stage, tables in TABLES.items():
        name, _, set_ = stage.partition("/")
        artifact = store.artifact(name, set_, last.stages[stage].fingerprint)
        assert artifact is not None
        for table in tables:
            for file in artifact.tables[table]:
                if not file.path.endswith("metrics.jsonl"):  # it holds times
                    digests.setdefault(f"{table} {_short(file.path)}", []).append(file.sha256)
        if name == "train":
            for file in artifact.tables["checkpoints"]:
                if file.path.endswith(".safetensors"):
                    tensors = safetensors.torch.load(store.bytes_of(file))
                    weights |= {key: _digest(one.numpy().tobytes()) for key, one in tensors.items()}
    return Made(seconds, {name: sorted(some) for name, some in digests.items()}, weights, err)


def _short(path: str) -> str:
    """Without what is drawn for each attempt, and without the name of a checkpoint: safetensors draws the order of its metadata."""
    name = path.rpartition("/")[2]
    if path.startswith("parts"):
        return _ATTEMPT.sub("", name)
    return name if path.startswith(("shards", "training")) else _KEY.sub("", "/".join(path.split("/")[2:]))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
