"""An earlier run counts again, and what runs after that builds on it: whole runs of curation over a pool that grows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import picture, write_folder
from commands import entries, indexed, lodeset, rows
from inline import in_one_process

import lodeset as package
from lodeset.infra import api
from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.store import Store

CONFIG = """store: ./runs
pool: [pool/]
dedup: {threshold: 0.99, reference_threshold: 0.99, verify: none}
cluster: {k: 2}
embed: {semantic: {kind: patch_dictionary, words: 8}}
"""
BATCH = 12


def batch(pool: Path, number: int) -> set[Path]:
    """Puts another few images into the pool."""
    named = [(f"{number}-{n}.png", picture(100 * number + n, width=64, height=64)) for n in range(BATCH)]
    write_folder(pool, named)
    return {pool / name for name, _ in named}


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A configuration whose store has three runs, each over a batch more than the one before."""
    folder = tmp_path_factory.mktemp("rollback")
    (folder / "c.yaml").write_text(CONFIG)
    with in_one_process():
        for number in range(3):
            batch(folder / "pool", number)
            lodeset("run", folder / "c.yaml")
    yield folder


@pytest.fixture
def config(three_runs: Path, tmp_path: Path, one_process: None) -> Path:
    """The same to change, in a folder of its own, whose sources are new places of the same images."""
    shutil.copytree(three_runs, tmp_path / "copy", copy_function=shutil.copy2)
    return tmp_path / "copy/c.yaml"


def status(config: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(lodeset("status", config, "--json")[0])
    return tree


def shards(config: Path) -> list[str]:
    return sorted(str(Path(one).relative_to(config.parent)) for one in package.load(config).dataset())


def test_what_counts_after_a_rollback_is_what_the_run_made(config: Path) -> None:
    of_first = {k: v["manifest"] for k, v in entries(config, "--run", "1").items()}
    files = set((config.parent / "runs").rglob("*.tar"))
    out, err = lodeset("rollback", config, "1", "--by", "night shift", "--why", "the second batch is bad")
    assert "run 1 made counts again, and what runs 2, 3 made does not (recorded as run 4)" in out
    assert "continues from run 1" in err
    told = status(config)
    assert told["run"] == 4 and {f"{e['stage']}/{e['set']}": e["manifest"] for e in told["artifacts"]} == of_first
    at = told["rolled_back"].pop("at")
    assert at.endswith("Z") and told["rolled_back"] == {
        "to": 1,
        "runs": [2, 3],
        "by": "night shift",
        "why": "the second batch is bad",
    }
    assert told["images"] == BATCH and Path(told["report"]).read_text().startswith("<!doctype html>")
    out, _ = lodeset("status", config)
    assert (
        f"rolled back to run 1 on {at} by night shift (the second batch is bad): what runs 2, 3 made does not count"
        in out
    )
    # Nothing was deleted, and the runs that do not count can still be asked for.
    assert set((config.parent / "runs").rglob("*.tar")) == files
    assert len(indexed(entries(config, "--run", "3")["write_shards/all"])) == 3 * BATCH
    assert len(package.load(config).dataset()) == 1 and package.load(config).dataset().images == BATCH


def test_the_run_after_a_rollback_builds_on_the_run_rolled_back_to(config: Path) -> None:
    of_first = entries(config, "--run", "1")
    ids_of = {n: set(indexed(entries(config, "--run", str(n))["write_shards/all"])) for n in (1, 3)}
    lodeset("rollback", config, "1")
    # The bad batch goes, and another one comes.
    for path in (config.parent / "pool").glob("1-*.png"):
        path.unlink()
    batch(config.parent / "pool", 7)
    before = set((config.parent / "runs/shards").rglob("*.tar"))
    out, _ = lodeset("run", config, "--json")
    told = json.loads(out)
    done = {f"{e['stage']}/{e['set']}": e for e in told["artifacts"]}
    assert told["run"] == 5 and told["rolled_back"] is None
    for id_ in ("write_shards/all", "dedup/pool", "fit_clusters/pool"):
        manifest = json.loads(Path(done[id_]["manifest"]).read_text())
        fingerprint = Path(of_first[id_]["manifest"]).parent.name
        assert manifest["inputs"]["previous"]["fingerprint"] == fingerprint, id_
    # It lists the shards of run 1 as they are and adds some of what is new; those of the runs rolled back are not in it.
    old = set(of_first["write_shards/all"]["tables"]["shards"])
    listed = set(done["write_shards/all"]["tables"]["shards"])
    assert (
        old < listed
        and {Path(one) for one in listed - old} == set((config.parent / "runs/shards").rglob("*.tar")) - before
    )
    ids = set(indexed(done["write_shards/all"]))
    assert ids_of[1] < ids and len(ids) == 3 * BATCH and ids & (ids_of[3] - ids_of[1])
    assert done["write_shards/all"]["details"]["since"]["added"] == {"pool as_is": 2 * BATCH}
    # And the next one finds nothing to do.
    assert json.loads(lodeset("run", config, "--json")[0])["run"] == 5


def test_a_run_that_repeats_what_was_rolled_back_is_refused(config: Path) -> None:
    lodeset("rollback", config, "1")
    before = shards(config)
    why = "nothing that shards are made from has changed since run 3, which was rolled back to run 1: run 1 remains the one that counts"
    _, err = lodeset("run", config, code=4)
    assert why in err and f"`lodeset rollback {config} 3` makes run 3 count again" in err
    _, err = lodeset("plan", config)
    assert why in err
    assert why in json.loads(lodeset("plan", config, "--json")[0])["refused"]
    # Touched sources are read again, and found to be the same; training alone is no reason to take the shards back.
    for path in (config.parent / "pool").glob("*.png"):
        path.touch()
    assert why in lodeset("run", config, code=4)[1]
    assert why in lodeset("run", config, "--set", "resources.cpus=1", code=4)[1]
    assert shards(config) == before and status(config)["run"] == 4
    # The middle run was rolled back as well.
    for path in (config.parent / "pool").glob("2-*.png"):
        path.unlink()
    assert "nothing that shards are made from has changed since run 2" in lodeset("run", config, code=4)[1]
    assert json.loads(lodeset("plan", config, "--fresh", "--json")[0])["refused"] is None


def test_the_next_run_mends_damaged_records_of_runs(config: Path) -> None:
    """Of an earlier run, of a rollback, and of the run that counts."""
    lodeset("rollback", config, "2")
    for number in (2, 4):
        record = config.parent / f"runs/runs/00000{number}.json"
        record.write_bytes(record.read_bytes().replace(b"stages", b"stagez", 1))
    lodeset("run", config)
    assert status(config)["images"] == 3 * BATCH
    assert "0 damaged" in lodeset("verify", config)[0]


def test_a_rollback_stands_until_other_shards_are_published(config: Path) -> None:
    """A run that stops before the shards publishes none, and compaction the same ones."""
    lodeset("rollback", config, "2")
    lodeset("compact", config)
    told = status(config)
    assert told["run"] == 5 and told["images"] == 2 * BATCH and told["rolled_back"]["to"] == 2
    lodeset("run", config, "--until", "dedup")
    assert status(config)["run"] == 6 and status(config)["rolled_back"]["to"] == 2
    assert "nothing that shards are made from has changed since run 3" in lodeset("run", config, code=4)[1]
    # Whoever wants the same again says so.
    lodeset("run", config, "--fresh")
    told = status(config)
    assert told["images"] == 3 * BATCH and told["rolled_back"] is None
    assert json.loads(lodeset("run", config, "--json")[0])["run"] == told["run"]


def test_stages_take_nothing_from_runs_that_were_rolled_back(config: Path) -> None:
    """Another setting of a late stage, over the same sources: dedup of run 3 continued from run 2, and would be found."""
    lodeset("rollback", config, "1")
    lodeset("run", config, "--set", "shards.seed=1")
    done = entries(config)
    first = entries(config, "--run", "1")
    manifest = json.loads(Path(done["dedup/pool"]["manifest"]).read_text())
    assert manifest["inputs"]["previous"]["fingerprint"] == Path(first["dedup/pool"]["manifest"]).parent.name
    assert len(indexed(done["write_shards/all"])) == 3 * BATCH


def test_a_rollback_can_be_rolled_back(config: Path) -> None:
    of_last = shards(config)
    lodeset("rollback", config, "1")
    out, _ = lodeset("rollback", config, "3")
    assert "run 3 made counts again, and what run 4 made does not" in out
    assert shards(config) == of_last
    lodeset("run", config)  # which finds all that run 3 made, though the images lie elsewhere
    assert shards(config) == of_last and status(config)["rolled_back"]["to"] == 3
    assert "run 6 is the one that counts already" in lodeset("rollback", config, "6", code=1)[1]
    lodeset("rollback", config, "3")
    assert "run 3 is the one that counts already" in lodeset("rollback", config, "7", code=1)[1]
    # A rollback stands for the run that it repeats.
    assert "what run 1 made counts again" in lodeset("rollback", config, "4")[0]


def test_a_rollback_to_what_is_not_there_is_refused(config: Path) -> None:
    assert "has no run 9: it has runs 1 to 3" in lodeset("rollback", config, "9", code=1)[1]
    _, err = lodeset("rollback", config, "1", "--limit", "5", code=1)
    assert "has no finished run of lodeset with --limit 5" in err
    store = Store(str(config.parent / "runs"))
    with claim(store, "run-other", "a run"):
        assert "a run is working on" in lodeset("rollback", config, "1", code=4)[1]
    lodeset("run", config, "--until", "dedup", "--set", "dedup.threshold=0.9")
    lodeset("run", config)
    assert "run 4 made no shards" in lodeset("rollback", config, "4", code=1)[1]
    victim = Path(entries(config, "--run", "1")["write_shards/all"]["tables"]["shards"][0])
    victim.rename(victim.with_suffix(".away"))
    _, err = lodeset("rollback", config, "1", code=1)
    assert "run 1 cannot count again" in err and victim.name in err and "it is missing" in err
    victim.with_suffix(".away").rename(victim)
    lodeset("compact", config, "--delete")
    assert "the manifest of write_shards/all" in lodeset("rollback", config, "2", code=1)[1]
    assert status(config)["rolled_back"] is None


def test_a_clean_up_keeps_what_counts_and_what_is_compared_with(config: Path) -> None:
    lodeset("accept", config, "--run", "2")
    lodeset("rollback", config, "1")
    before = shards(config)
    collected = api.gc(api.open_store(config), keep=1, older_than=0)
    assert (collected.kept_runs, collected.dropped_runs) == ((2, 4), (1, 3))
    assert shards(config) == before and len(indexed(entries(config)["write_shards/all"])) == BATCH
    assert len(indexed(entries(config, "--run", "2")["write_shards/all"])) == 2 * BATCH
    # The record of run 1 is gone, but not what it made, nor what the rollback is about.
    assert "run 4 is the one that counts already" in lodeset("rollback", config, "4", code=1)[1]
    assert (
        "nothing that shards are made from has changed since run 3, which was rolled back to run 1"
        in lodeset("run", config, code=4)[1]
    )
    assert "has no run 3" in lodeset("rollback", config, "3", code=1)[1]
    batch(config.parent / "pool", 9)
    lodeset("run", config)
    assert json.loads(Path(entries(config)["write_shards/all"]["manifest"]).read_text())["details"]["shards"] == 2


def test_what_was_forgotten_since_stays_forgotten(config: Path) -> None:
    first = entries(config, "--run", "1")
    image_id = rows(first["write_shards/all"], "index")[0]["image_id"]
    lodeset("forget", config, image_id)
    lodeset("rollback", config, "1")
    told = entries(config)["write_shards/all"]
    assert told["rows"]["kept"] == BATCH - 1 and image_id not in indexed(told)
    for shard in told["tables"]["shards"]:
        assert image_id.encode() not in Path(shard).read_bytes()
    batch(config.parent / "pool", 8)
    lodeset("run", config)
    assert image_id not in indexed(entries(config)["write_shards/all"])
