"""kill -9 of the driver, and of a worker, in the middle of a stage; then the run goes on as if nothing had happened.

A kill matters per mechanism (the driver, a worker of the pool, a Ray worker, a training worker), so one of each runs with the
slow tests. `make test-kills` runs them for every stage.
"""

from __future__ import annotations

import ipaddress
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import Run, part_manifests, shard_digests

from lodeset.infra.demo.world import make_world, write_config

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
# What runs with the slow tests: a stage for each mechanism.
CHOSEN = {"driver": ("ingest/pool", "dedup/pool"), "worker": ("ingest/pool", "embed/pool")}
COMMIT_S = 0.4
PATIENCE_S = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sample world, cut so that every stage has at least eight parts."""
    folder = tmp_path_factory.mktemp("kill") / "world"
    make_world(folder, 400)
    path = write_config(folder, 400)
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
def undisturbed(world: Path) -> Path:
    """The store of a run that was left alone."""
    store = world / "undisturbed"
    heard: set[tuple[str, str]] = set()
    with Run(("run", world / "lodeset.yaml", "--set", f"store={store}")) as run:
        assert run.process is not None
        while run.process.poll() is None:
            heard |= run.listening()
            time.sleep(1.0)
        code, err = run.wait()
    assert code == 0, err
    (world / HEARD).write_text(json.dumps(sorted(heard)))
    counts = {stage: _count_parts(store, stage) for stage in PARTS}
    assert all(count >= FEWEST_PARTS for count in counts.values()), f"too few parts to be killed among: {counts}"
    return store


HEARD = "heard.json"


def test_nothing_listens_beyond_loopback(world: Path, undisturbed: Path) -> None:
    """In any stage: curation, training, evaluation and pruning ran."""
    heard = json.loads((world / HEARD).read_text())
    assert any("raylet" in name for _, name in heard), heard
    assert all(ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback for address, _ in heard), heard


def _count_parts(store: Path, stage: str) -> int:
    """Of one stage and set: several sets share a folder of parts."""
    (manifest,) = (store / "artifacts" / stage).glob("*/manifest.json")
    folder = len(part_manifests(store, PARTS[stage]))
    return min(folder, json.loads(manifest.read_text())["details"].get("parts", folder))


def _every_stage() -> list[Any]:
    return [
        pytest.param(victim, stage, marks=() if stage in CHOSEN[victim] else pytest.mark.kills)
        for victim in ("driver", "worker")
        for stage in PARTS
    ]


@pytest.mark.parametrize(("victim", "stage"), _every_stage())
def test_killed_after_the_third_part(world: Path, undisturbed: Path, victim: str, stage: str) -> None:
    """In a store that holds what comes before the stage. Nothing committed is lost or made again, and the shards are the same."""
    store = world / f"{victim}-{stage.replace('/', '-')}"
    shutil.copytree(undisturbed, store)
    for leftover in ("parts", "artifacts"):
        _forget(store / leftover, stage)
    # What lies below the shards is run only where it is what is killed; there the shards stay.
    below = stage in ("evaluate/all", "prune/all")
    for leftover in () if below else ("shards", "parts/shard_index"):
        shutil.rmtree(store / leftover)
    until = stage.partition("/")[0] if below else "write_shards"
    arguments = ("run", world / "lodeset.yaml", "--set", f"store={store}", "--until", until)
    parts = PARTS[stage]
    before = set(part_manifests(store, parts))
    with Run(arguments, slow_commit_s=COMMIT_S) as run:
        assert run.process is not None
        deadline = time.monotonic() + PATIENCE_S
        while len(set(part_manifests(store, parts)) - before) < 3:
            assert run.process.poll() is None, f"ended before the third part of {stage}: {run.wait()}"
            assert time.monotonic() < deadline, f"no third part of {stage} in {PATIENCE_S} s"
            time.sleep(0.02)
        if victim == "driver":
            run.kill_driver()
            run.wait()
            committed, code = part_manifests(store, parts), 1
        else:
            # Before the kill: a run that survives the loss of a worker goes on, and may not touch what was there either.
            committed = part_manifests(store, parts)
            run.kill_worker()
            code, err = run.wait(240)
            # An engine may replace a worker and go on; if it cannot, the run says so and stops.
            assert code in (0, 1) and "Traceback" not in err, err
        assert run.gone_within(60), run.processes()
    if code != 0:
        code, err = Run(arguments).start().wait()
        assert code == 0, err
    now = part_manifests(store, parts)
    assert {key: now.get(key) for key in committed} == committed, f"parts of {parts} were lost or written again"
    assert shard_digests(store) == shard_digests(undisturbed)
    shutil.rmtree(store)


def _forget(folder: Path, stage: str) -> None:
    """Leaves what comes before a stage and takes away the rest, so that the run starts there."""
    names = list(PARTS)
    later = names[names.index(stage) :]
    for path in folder.iterdir():
        touched = {PARTS[s] for s in later} if folder.name == "parts" else {s.split("/")[0] for s in later}
        if path.name in touched:
            shutil.rmtree(path)


@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_training_goes_on_from_its_checkpoint(world: Path, undisturbed: Path, victim: str) -> None:
    """Killed after its third checkpoint, a run ends with the weights of the one that was left alone."""
    store = world / f"training-{victim}"
    shutil.copytree(undisturbed, store)
    for name in ("artifacts/train", "artifacts/evaluate", "artifacts/prune", "training"):
        shutil.rmtree(store / name)
    arguments = ("run", world / "lodeset.yaml", "--set", f"store={store}", "--until", "train")
    with Run(arguments) as run:
        assert run.process is not None
        deadline = time.monotonic() + PATIENCE_S
        # Only the newest checkpoints are kept, so the third is seen by its name.
        while not list((store / "training").glob("*/step-000000[6-9]")):
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
    code, err = Run(arguments).start().wait()
    assert code == 0, err
    weights = [next((s / "training").glob("*/model.safetensors")).read_bytes() for s in (store, undisturbed)]
    assert weights[0] == weights[1]
    shutil.rmtree(store)
