"""The demo end to end, on a smaller world and with fewer steps: its figures, and the gate."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import typed

from lodeset.infra import api
from lodeset.infra.demo.truth import Truth, load_truth
from lodeset.infra.demo.world import make_world, write_config
from lodeset.pruning.choosing.criteria import METHODS


def demo(folder: Path) -> tuple[int, dict[str, Any]]:
    code, out, _ = typed("demo", folder, "--json")
    told: dict[str, Any] = json.loads(out)
    return code, told


def leak(folder: Path, image_id: str) -> None:
    """Says of an image that it is a copy of a reference image."""
    truth = json.loads((folder / "truth.json").read_text())
    truth["leaked"][image_id] = "exact"
    (folder / "truth.json").write_text(json.dumps(truth))


def assert_sane(told: dict[str, Any], truth: Truth) -> None:
    assert told["leaked"] == 0 and truth.leaked
    assert 0.3 < told["recall"] <= 1 and 0.9 < told["precision"] <= 1
    assert set(told["purity"]) == set(truth.curated)
    # In a world this small no cluster holds enough of beta's images; alpha's come by similarity.
    alpha = told["purity"]["alpha"]
    assert alpha["images"] > 0 and alpha["base_rate"] < alpha["purity"] <= 1
    target = told["knn"]["target"]
    assert set(target["knn"]) == {"trained", "untrained", "embedder"}
    chance = 1 / target["classes"]
    assert all(chance < accuracy <= 1 for by_k in target["knn"].values() for accuracy in by_k.values())
    (job,) = told["pruning"]
    assert [v["method"] for v in job["variants"]] == list(METHODS)
    assert all(0 < v["parameters_removed"] < 1 and 0 < v["knn"]["target"]["10"] <= 1 for v in job["variants"])
    (leaks,) = told["lines"]["leaked reference images"]
    assert leaks == f"0 in the shards, of {len(truth.leaked)} planted in the pool"
    assert told["lines"]["pool"][0].startswith(f"ingest/pool: {truth.files} -> {len(truth.concepts)} ")


@pytest.mark.slow
def test_the_demo_and_its_gate(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    make_world(folder, 400)
    config = write_config(folder, 400)
    text = config.read_text().replace("steps: 1200", "steps: 24").replace("[0.2, 0.4, 0.6]", "[0.3]")
    config.write_text(text)
    code, told = demo(folder)
    assert code == 0, told
    assert_sane(told, load_truth(folder))
    assert told["lines"]["report"] == [str(folder / "report.html")] and (folder / "report.html").stat().st_size > 10_000

    opened = api.open_config(config)
    entries = api.status(opened)
    assert all(
        e["finished"] and e["rows"]["in"] == e["rows"]["kept"] + sum(e["rows"]["dropped"].values()) for e in entries
    )

    index = api.artifacts(opened)["write_shards/all"].tables["index"]
    leak(folder, opened.store.table(index, ["image_id"])["image_id"][0].as_py())
    code, told = demo(folder)
    assert (code, told["exit_code"]) == (3, 3)
    assert told["error"].startswith("1 images that are copies of reference images reached the shards")


def test_a_demo_whose_configuration_lacks_what_is_judged_says_so(tmp_path: Path) -> None:
    make_world(tmp_path, 200)
    config = write_config(tmp_path)
    text = config.read_text()
    config.write_text(text[: text.index("training:")])
    code, told = demo(tmp_path)
    assert code == 2
    assert "no longer makes train/all, prune/all: remove it" in told["error"]
