"""The demo end to end: its figures, and the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import asked
from runs import WholeRun

from lodeset.infra import api
from lodeset.infra.demo.truth import Truth, load_truth
from lodeset.pruning.choosing.criteria import METHODS

pytestmark = pytest.mark.slow


def demo(folder: Path) -> tuple[int, dict[str, Any]]:
    """Everything is finished by now: it is judged, once more."""
    code, out, _ = asked("demo", folder, "--json")
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
    assert [v["method"] for v in job["variants"]] == 2 * list(METHODS)
    assert all(0 < v["parameters_removed"] < 1 and 0 < v["knn"]["target"]["10"] <= 1 for v in job["variants"])
    (leaks,) = told["lines"]["leaked reference images"]
    assert leaks == f"0 in the shards, of {len(truth.leaked)} planted in the pool"
    assert told["lines"]["pool"][0].startswith(f"ingest/pool: {truth.files} -> {len(truth.concepts)} ")


def test_its_figures_are_sane(whole: WholeRun) -> None:
    code, told = demo(whole.folder)
    assert code == 0, told
    assert_sane(told, load_truth(whole.folder))
    page = whole.folder / "report.html"
    assert told["lines"]["report"] == [str(page)] and page.stat().st_size > 10_000
    entries = api.status(api.open_config(whole.config))
    assert all(
        e["finished"] and e["rows"]["in"] == e["rows"]["kept"] + sum(e["rows"]["dropped"].values()) for e in entries
    )


def test_an_image_that_leaked_is_a_breach(whole: WholeRun) -> None:
    opened = api.open_config(whole.config)
    index = api.artifacts(opened)["write_shards/all"].tables["index"]
    truth = whole.folder / "truth.json"
    before = truth.read_text()
    leak(whole.folder, opened.store.table(index, ["image_id"])["image_id"][0].as_py())
    try:
        code, told = demo(whole.folder)
    finally:
        truth.write_text(before)
    assert (code, told["exit_code"]) == (3, 3)
    assert told["error"].startswith("1 images that are copies of reference images reached the shards")
