"""kill -9 of the driver, and of a worker, in the middle of every stage; then the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml
from runs import Run, part_manifests, shard_digests

from infra.demo.world import make_world, write_config

pytestmark = pytest.mark.slow

# Where the parts of each stage lie, in the order in which a fresh run comes to them; stages that fit
# one thing have one part.
PARTS = {
    "ingest/pool": "ingest",
    "embed/pool": "embed",
    "calibrate/pool": "calibrate",
    "filter/pool": "filter",
    "dedup/pool": "dedup_search",
    "retrieve/alpha": "retrieve_search",
    "cluster/pool": "cluster",
    "write_shards/all": "write_shards",
    "evaluate/all": "evaluate_features",
    "prune/all": "prune_variant",
}
FEWEST_PARTS = 8
COMMIT_S = 0.4
PATIENCE_S = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sample world, cut so that every stage has at least eight parts."""
    folder = tmp_path_factory.mktemp("kill") / "world"
    make_world(folder, 400)
    path = write_config(folder)
    config = yaml.safe_load(path.read_text())
    config["ingest"] = {"slice_mb": 0.25}
    config["dedup"] = {"part_images": 40, "calibration_images": 40}
    config["curated"][0]["retrieve"]["part_images"] = 1
    config["shards"] = {"size_mb": 0.04}
    config["training"] = {"recipe": "tiny", "steps": 24, "batch": 8, "checkpoint_every": 2, "log_every": 2}
    config["resources"] = {"cpus": 2}
    path.write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> dict[str, str]:
    code, err = Run(("run", world / "lodeset.yaml", "--set", "store=./undisturbed")).start().wait()
    assert code == 0, err
    counts = {stage: _count_parts(world / "undisturbed", stage) for stage in PARTS}
    assert all(count >= FEWEST_PARTS for count in counts.values()), f"too few parts to be killed among: {counts}"
    return shard_digests(world / "undisturbed")


def _count_parts(store: Path, stage: str) -> int:
    """Of one stage and set: several sets share a folder of parts."""
    (manifest,) = (store / "artifacts" / stage).glob("*/manifest.json")
    folder = len(part_manifests(store, PARTS[stage]))
    return min(folder, json.loads(manifest.read_text())["details"].get("parts", folder))


def _interrupt(world: Path, store: str, stage: str, victim: str, *until: str) -> None:
    """Runs until the third part of a stage is committed, kills, and checks what the next run finds."""
    folder, parts = world / store, PARTS[stage]
    before = set(part_manifests(folder, parts))
    with Run(("run", world / "lodeset.yaml", "--set", f"store=./{store}", *until), slow_commit_s=COMMIT_S) as run:
        assert run.process is not None
        deadline = time.monotonic() + PATIENCE_S
        while len(set(part_manifests(folder, parts)) - before) < 3:
            assert run.process.poll() is None, f"ended before the third part of {stage}: {run.wait()}"
            assert time.monotonic() < deadline, f"no third part of {stage} in {PATIENCE_S} s"
            time.sleep(0.02)
        if victim == "driver":
            run.kill_driver()
            run.wait()
            committed = part_manifests(folder, parts)
        else:
            # Before the kill: a run that survives the loss of a worker goes on, and may not touch what was there either.
            committed = part_manifests(folder, parts)
            run.kill_worker()
            code, err = run.wait(240)
            # An engine may replace a worker and go on; if it cannot, the run says so and stops.
            assert code in (0, 1) and "Traceback" not in err, err
            _assert_untouched(folder, parts, committed)
        assert run.gone_within(60), run.processes()
    _remember(folder, parts, committed)


def _assert_untouched(folder: Path, parts: str, committed: dict[str, tuple[int, str]]) -> None:
    now = part_manifests(folder, parts)
    assert {key: now.get(key) for key in committed} == committed, f"parts of {parts} were lost or written again"


_REMEMBERED: dict[tuple[Path, str], dict[str, tuple[int, str]]] = {}


def _remember(folder: Path, parts: str, committed: dict[str, tuple[int, str]]) -> None:
    _REMEMBERED[folder, parts] = committed


def _finish(world: Path, store: str, undisturbed: dict[str, str], *until: str) -> None:
    code, err = Run(("run", world / "lodeset.yaml", "--set", f"store=./{store}", *until)).start().wait()
    assert code == 0, err
    for (folder, parts), committed in _REMEMBERED.items():
        if folder == world / store:
            _assert_untouched(folder, parts, committed)
    assert shard_digests(world / store) == undisturbed


@pytest.mark.parametrize("stage", PARTS)
def test_driver_killed(world: Path, stage: str) -> None:
    # Stages that run side by side may have finished before the kill of another.
    for leftover in ("parts", "artifacts"):
        if (world / "driver" / leftover).exists():
            _forget(world / "driver" / leftover, stage)
    _interrupt(world, "driver", stage, "driver")


def test_shards_after_every_driver_kill(world: Path, undisturbed: dict[str, str]) -> None:
    _finish(world, "driver", undisturbed)


@pytest.mark.parametrize("stage", PARTS)
def test_worker_killed(world: Path, undisturbed: dict[str, str], stage: str) -> None:
    """In a store of its own for each stage, because a run that survives the loss of a worker finishes."""
    store = f"worker-{stage.replace('/', '-')}"
    shutil.copytree(world / "undisturbed", world / store)
    for leftover in ("parts", "artifacts"):
        _forget(world / store / leftover, stage)
    # What lies below the shards is run only where it is what is killed; there the shards stay.
    below = stage in ("evaluate/all", "prune/all")
    until = () if below else ("--until", "write_shards")
    for leftover in () if below else ("shards", "parts/shard_index"):
        shutil.rmtree(world / store / leftover)
    _interrupt(world, store, stage, "worker", *until)
    _finish(world, store, undisturbed, *until)
    shutil.rmtree(world / store)


def _forget(folder: Path, stage: str) -> None:
    """Leaves what comes before a stage and takes away the rest, so that the run starts there."""
    names = list(PARTS)
    later = names[names.index(stage) :]
    for path in folder.iterdir():
        touched = {PARTS[s] for s in later} if folder.name == "parts" else {s.split("/")[0] for s in later}
        if path.name in touched:
            shutil.rmtree(path)


@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_training_goes_on_from_its_checkpoint(world: Path, undisturbed: dict[str, str], victim: str) -> None:
    """Killed after its third checkpoint, a run ends with the weights of the one that was left alone."""
    store = f"training-{victim}"
    shutil.copytree(world / "undisturbed", world / store)
    for name in ("artifacts/train", "artifacts/evaluate", "artifacts/prune", "training"):
        shutil.rmtree(world / store / name)
    with Run(("run", world / "lodeset.yaml", "--set", f"store=./{store}")) as run:
        assert run.process is not None
        deadline = time.monotonic() + PATIENCE_S
        # Only the newest checkpoints are kept, so the third is seen by its name.
        while not list((world / store / "training").glob("*/step-000000[6-9]")):
            assert run.process.poll() is None, run.wait()
            assert time.monotonic() < deadline, f"no third checkpoint in {PATIENCE_S} s"
            time.sleep(0.02)
        if victim == "driver":
            run.kill_driver()
            run.wait()
        else:
            run.kill_worker()
            code, err = run.wait(240)
            assert code in (0, 1)
            assert "Traceback" not in err, err
        assert run.gone_within(60), run.processes()
    code, err = Run(("run", world / "lodeset.yaml", "--set", f"store=./{store}")).start().wait()
    assert code == 0, err
    weights = [next((world / s / "training").glob("*/model.safetensors")).read_bytes() for s in (store, "undisturbed")]
    assert weights[0] == weights[1]
    shutil.rmtree(world / store)
