"""Two small sample worlds, each run once for all tests of whole runs: one is curated, the other is the demo from end to end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import copied, entries, typed
from runs import Run, WholeRun

from lodeset.infra.demo.truth import Truth, load_truth
from lodeset.infra.demo.world import make_world, write_config
from lodeset.pipeline.dag.cluster import LOCAL
from lodeset.pipeline.engines.ray import cluster


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curation") / "world"
    make_world(folder, 260)
    path = write_config(folder, 260)
    config = yaml.safe_load(path.read_text())
    del config["training"], config["pruning"]
    config["ingest"] = {"slice_mb": 0.5}
    config["dedup"] = {"calibration_images": 40}
    config["shards"] = {"size_mb": 0.2}
    config["curated"][1]["retrieve"]["min_matches"] = (
        2  # of 8 images: which clusters they fall in moves with what dedup keeps
    )
    path.write_text(yaml.safe_dump(config))
    code, _, err = typed("run", path)
    assert code == 0, err
    return folder


@pytest.fixture(scope="session")
def truth(world: Path) -> Truth:
    return load_truth(world)


@pytest.fixture(scope="session")
def finished(world: Path) -> dict[str, dict[str, Any]]:
    return entries(world / "lodeset.yaml")


@pytest.fixture
def copy(world: Path, one_process: None) -> Iterator[Path]:
    """A configuration of the same world with a copy of the finished store, to change: without the engines, which made the store."""
    yield copied(world / "lodeset.yaml", "copy")
    shutil.rmtree(world / "copy")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """The demo on a smaller world and with fewer steps, cut so that every stage has at least eight parts."""
    folder = tmp_path_factory.mktemp("whole") / "world"
    make_world(folder, 400)
    path = write_config(folder, 400)
    config = yaml.safe_load(path.read_text())
    config["ingest"] = {"slice_mb": 0.25}
    config["filter"]["min_sharpness"] = 1e-6  # reads every image, and drops none
    config["dedup"] = {"part_images": 40, "calibration_images": 40}
    config["curated"][0]["retrieve"]["part_images"] = 1
    config["shards"] = {"size_mb": 0.04}
    config["training"] |= {"steps": 24, "batch": 8, "checkpoint_every": WholeRun.CHECKPOINT_EVERY, "log_every": 2}
    config["pruning"] = [{"method": "entropic", "remove": [0.2, 0.3]}]
    config["resources"] = {"cpus": 2, "ray": {"in_place_s": 0}}  # every stage has workers of its engine
    path.write_text(yaml.safe_dump(config))
    heard: set[tuple[str, str]] = set()
    with Run(("demo", folder)) as run:
        assert run.process is not None
        while run.process.poll() is None:
            heard |= run.listening()
            time.sleep(1.0)
        code, err = run.wait()
    assert code == 0, err
    return WholeRun(folder, frozenset(heard))


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A local cluster that commands can join; starting one for each takes seconds."""
    with cluster(LOCAL, 2) as joined:
        yield joined.address
