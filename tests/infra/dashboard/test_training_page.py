"""What the page about training and pruning shows is what the stages recorded."""

from __future__ import annotations

import json
import time

import pyarrow as pa
import pytest
from dashboard_client import browsing
from inspected_world import Maker, make

from lodeset.infra.looking.held import configuration
from lodeset.infra.report.contents import Training
from lodeset.infra.report.curves import ROWS, curves
from lodeset.infra.session import Opened, open_store
from lodeset.pipeline.dag.runs import Wanted, artifacts_of, record
from lodeset.pipeline.dag.store import File, Rows
from lodeset.pipeline.tables import records

PNG = b"\x89PNG\r\n\x1a\n a picture"


def train(opened: Opened, seed: int, accuracy: float, terms: tuple[str, ...] = ("loss", "dino", "lr")) -> None:
    """A further run of the store whose network was trained."""
    store = opened.store
    maker = Maker(store, seed, dict(artifacts_of(store, store.run(1))))
    path = f"training/x{seed}/metrics.jsonl"
    with store.writing(path) as sink:
        for step in range(1, 41):
            line = {"step": step, **dict.fromkeys(terms, seed / step), "feature_rank": 3.0 + seed}
            sink.write(json.dumps(line).encode() + b"\n")
    metrics = File(path, 0, sink.size_bytes, sink.sha256())
    summary = {
        "steps": 40, "images": 9, "images_seen": 320, "skipped": 0, "workers": 1, "resumed_step": 0, "seconds": 7.0,
        "images_per_s": 45.7, "folder": f"training/x{seed}", "losses": dict.fromkeys(terms, 0.5),
    }  # fmt: skip
    maker.put("train/all", {"metrics": [metrics]}, Rows(9, 9), {}, {"shards": "write_shards/all"}, summary)
    pictures = pa.table(
        [["birds"], ["0" * 32], ["trained"], pa.array([PNG], pa.binary()), pa.array([PNG], pa.binary())],
        schema=records.PICTURES,
    )
    knn = {"trained": {"10": accuracy, "20": accuracy / 2}, "untrained": {"10": 0.25, "20": 0.125}}
    told = {"targets": {"birds": {"knn": knn, "linear": {}, "gallery": 6, "test": 2, "classes": 4}}}
    maker.put("evaluate/all", {"pictures": [pictures]}, Rows(8, 8), {}, {"train": "train/all"}, told)
    wanted = Wanted(opened.config.name, None, "", configuration(opened.config), tuple(maker.made))
    record(store, wanted, maker.made, {"lodeset": "0"}, time.time() - 60, time.time())


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    found = open_store(make(tmp_path_factory.mktemp("trained"), 60))
    train(found, 2, 0.5)
    train(found, 3, 0.75)
    return found


def test_a_training_is_shown_with_its_figures(opened: Opened) -> None:
    with browsing(opened) as browser:
        page = browser.get("/training").text
    assert "Training and pruning of run 3" in page
    for label in ("total loss", "DINO term", "learning rate", "effective rank of features"):
        assert f"{label}" in page
    assert "iBOT term" not in page  # nobody recorded it
    assert "75.0 %" in page and "25.0 %" in page
    assert page.count("data:image/png;base64,") == 2
    assert "Accuracy over runs" in page
    assert "50.0" in page and "75.0" in page
    assert "style=" not in page  # which the policy forbids


def test_two_runs_stand_beside_each_other(opened: Opened) -> None:
    with browsing(opened) as browser:
        page = browser.get("/training?run=3&with=2").text
        same = browser.get("/training?run=3&with=3").text
    assert page.count('class="line dashed"') >= 4
    assert 'class="line dashed"' not in browser_alone(opened)
    assert "(+25.0)" in page  # percentage points of kNN
    assert "used this very training" in same


def browser_alone(opened: Opened) -> str:
    with browsing(opened) as browser:
        return browser.get("/training").text


def test_a_run_without_training_says_what_to_add(opened: Opened) -> None:
    with browsing(opened) as browser:
        answer = browser.get("/training?run=1")
    assert answer.status_code == 200
    assert "trained no model" in answer.text
    assert "training: {recipe: tiny" in answer.text


def test_curves_are_those_that_were_recorded() -> None:
    lines = tuple({"step": n, "loss": 1.0 / n, "swav": 2.0, "skipped": 0} for n in range(1, 101))
    one = Training("train", {"losses": {"loss": 0.1, "swav": 2.0}}, lines)
    groups = {group.title: group for group in curves({"": one})}
    assert list(groups) == ["Loss terms"]
    assert groups["Loss terms"].columns == ["total loss", "swav term"]
    rows = groups["Loss terms"].rows
    assert len(rows) == ROWS
    assert [row[1] for row in rows][:: ROWS - 1] == [1, 100]
    assert all(values == [1.0 / step, 2.0] for _, step, values in rows)
    two = curves({"a": one, "b": Training("train", {}, ({"step": 1, "lr": 0.5},))})
    assert {group.title for group in two} == {"Loss terms", "Schedules"}
    assert ("b", 1, [None, None]) in next(g for g in two if g.title == "Loss terms").rows
