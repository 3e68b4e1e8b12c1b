"""A small sample world, curated once for all whole-run tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import copied, entries, lodeset

from lodeset.infra.demo.truth import Truth, load_truth
from lodeset.infra.demo.world import make_world, write_config


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
    lodeset("run", path)
    return folder


@pytest.fixture(scope="session")
def truth(world: Path) -> Truth:
    return load_truth(world)


@pytest.fixture(scope="session")
def finished(world: Path) -> dict[str, dict[str, Any]]:
    return entries(world / "lodeset.yaml")


@pytest.fixture
def copy(world: Path) -> Iterator[Path]:
    """A configuration of the same world with a copy of the finished store, to change."""
    yield copied(world / "lodeset.yaml", "copy")
    shutil.rmtree(world / "copy")
