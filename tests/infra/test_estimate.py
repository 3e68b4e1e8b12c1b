"""What `plan` says of time and bytes, before anything was run and after."""

from pathlib import Path
from typing import Any

import pytest
from builders import picture, write_folder
from rich.console import Console
from typer.testing import CliRunner

from lodeset.infra import api
from lodeset.infra.cli import main as cli
from lodeset.infra.estimate import GUESSED_SOURCE_BYTES, Estimate
from lodeset.pipeline.dag.fingerprint import canonical
from lodeset.pipeline.dag.store import Artifact, File, Rows
from lodeset.training.config import TrainingConfig
from lodeset.training.cost import stored_bytes

TAR_BYTES = 400 * GUESSED_SOURCE_BYTES


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tar of which only the size is looked at, five loose images and a target set."""
    with open(tmp_path / "pool.tar", "wb") as file:
        file.truncate(TAR_BYTES)
    for name in ("loose", "target"):
        write_folder(tmp_path / name, [(f"{n}.png", picture(n)) for n in range(5)])
    path = tmp_path / "lodeset.yaml"
    path.write_text(
        "pool: [pool.tar, loose/]\ntargets: [{name: target, uri: target/}]\n"
        "training: {steps: 300}\npruning: [{sweep: [1.0e-4, 1.0e-3, 1.0e-2]}]\nresources: {cpus: 2}\n"
    )
    return path


def planned(config: Path, *overrides: str) -> dict[str, Estimate]:
    return {d.stage.id: e for d, e in api.plan(api.open_config(config, overrides))}


def remember(config: Path, id_: str, taken: int, seconds: float, size_bytes: int, **details: Any) -> None:
    """An earlier run of a stage, from other inputs."""
    opened = api.open_config(config)
    stage = opened.stages[id_]
    opened.store.commit_artifact(
        Artifact(
            stage.name, stage.set, stage.version, "0" * 64, canonical(stage.config), {},
            {"rows": (File("rows", taken, size_bytes, ""),)}, Rows(taken, taken), {}, details, seconds, 1.0,
        )
    )  # fmt: skip


def test_images_of_tars_are_guessed_from_their_bytes_and_loose_ones_counted(config: Path) -> None:
    found = planned(config)
    assert (found["ingest/pool"].images, found["ingest/pool"].images_guessed) == (405, True)
    assert (found["ingest/target"].images, found["ingest/target"].images_guessed) == (5, False)
    assert (found["evaluate/all"].images, found["evaluate/all"].images_guessed) == (5, False)
    assert planned(config, "ingest.limit=7")["ingest/pool"].images == 7
    remember(config, "ingest/pool", taken=4000, seconds=8.0, size_bytes=4_000_000)
    again = planned(config)["ingest/pool"]
    # A mean of its own: about the bytes of the tar in 4,000 images.
    assert again.images == pytest.approx(4005, rel=0.01) and again.images_guessed
    assert again.seconds == pytest.approx(8.0, rel=0.01) and again.size_bytes == pytest.approx(4e6, rel=0.01)


def test_a_first_plan_tells_time_and_bytes(config: Path) -> None:
    found = planned(config)
    assert all(e.seconds is not None and e.seconds >= 5 for e in found.values())
    assert found["train/all"].seconds == pytest.approx(5 + 9_600 / 95)
    assert found["train/all"].size_bytes == stored_bytes(TrainingConfig(steps=300))
    assert found["prune/all"].seconds == pytest.approx(5 + 18 * 1.4)
    assert found["write_shards/all"].size_bytes == pytest.approx(TAR_BYTES, rel=0.01)
    # What is not known is not 0.
    unknown = {id_ for id_, e in found.items() if e.size_bytes is None}
    assert unknown == {"fit_embedder/pool", "calibrate/pool", "fit_clusters/pool"}
    assert all(e.size_bytes for id_, e in found.items() if id_ not in unknown)


def test_a_balanced_sample_is_what_is_written(config: Path) -> None:
    whole, part = planned(config), planned(config, "balance.images=81", "cluster.k=[20, 4]")
    assert "balance/pool" not in whole and whole["write_shards/all"].images == 405
    assert part["balance/pool"].images == 405 and part["balance/pool"].size_bytes
    assert part["write_shards/all"].images == 81
    assert part["write_shards/all"].size_bytes == pytest.approx(TAR_BYTES * 81 / 405, rel=0.01)
    assert planned(config, "balance.images=9999")["write_shards/all"].images == 405


def test_time_is_scaled_by_the_work_of_the_last_run(config: Path) -> None:
    remember(config, "train/all", taken=2000, seconds=100.0, size_bytes=9, work=9_600, resumed_step=0)
    remember(config, "prune/all", taken=1, seconds=60.0, size_bytes=5_000_000, work=18, parts=28, parts_made=28)
    for steps, seconds in ((300, 100.0), (30_000, 10_000.0)):
        assert planned(config, f"training.steps={steps}")["train/all"].seconds == pytest.approx(seconds)
    assert planned(config)["prune/all"].seconds == pytest.approx(60.0)
    assert planned(config, "pruning.0.sweep=[1.0e-3]")["prune/all"].seconds == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("id_", "details"),
    [("train/all", {"work": 9_600, "resumed_step": 290}), ("prune/all", {"work": 18, "parts": 28, "parts_made": 1})],
)
def test_a_run_that_went_on_from_another_is_no_measure(config: Path, id_: str, details: dict[str, Any]) -> None:
    first = planned(config)[id_].seconds
    remember(config, id_, taken=1, seconds=1.0, size_bytes=1, **details)
    assert planned(config)[id_].seconds == first


def test_the_plan_says_what_is_guessed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "out", Console(width=200))
    printed = CliRunner().invoke(cli.app, ["plan", str(config)], catch_exceptions=False).stdout
    assert " ~405 " in printed and "~: estimated from the sizes of tars" in printed
    assert " ~0 B" not in printed
