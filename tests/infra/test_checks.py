"""What is wrong with models and target sets is said before anything expensive runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from builders import picture
from inline import target_set
from onnx_files import write_detector, write_means

from lodeset.infra import checks, dag
from lodeset.infra.config import Config
from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.dag.stage import Stage, closure
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import LodesetError

NUMBERS = {"threshold": 0.9, "reference_threshold": 0.9}  # precomputed vectors cannot be calibrated
VECTORS = {"embed": {"semantic": {"kind": "precomputed", "path": "{good}"}}, "dedup": NUMBERS}
RunStages = Callable[[Mapping[str, Stage], Callable[[Event], None]], Mapping[str, Artifact]]


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    for folder in ("pool", "t"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(picture(0))
    return {"store": str(tmp_path / "runs"), "pool": [str(tmp_path / "pool")]}


def stages_of(tree: dict[str, Any], until: str | None = None) -> Mapping[str, Stage]:
    return closure(dag.build(Config.model_validate(tree)), until)


def nothing_runs(stages: Mapping[str, Stage], watch: Callable[[Event], None]) -> Mapping[str, Artifact]:
    raise AssertionError(f"{list(stages)} was to run")


def before(tree: dict[str, Any], run: RunStages = nothing_runs, until: str | None = None) -> list[str]:
    """What is told of stages, here and in a run that follows."""
    told: list[str] = []
    store = Store(tree["store"])
    store.prepare()
    stages = stages_of(tree, until)
    then = checks.before(store, stages, run, lambda event: told.append(f"{event.kind} {event.stage.id}"), {})
    for stage in stages.values():
        then(Event("finished", stage))
    return told


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"embed": {"semantic": {"kind": "onnx", "path": "{wide}"}}}, "only squares"),
        ({"embed": {"dedup": {"kind": "onnx", "path": "{good}", "output": "x"}}}, "has no output x"),
        (
            VECTORS,
            "cannot be read as Parquet",
        ),
        (
            {"filter": {"classifiers": [{"name": "nsfw", "path": "{good}", "keep": "below", "threshold": 0.5}]}},
            "say which is the score",
        ),
        ({"filter": {"faces": {"path": "{good}"}}}, "what is understood is two outputs"),
    ],
)
def test_models_are_tried_before_anything_runs(
    tree: dict[str, Any], tmp_path: Path, section: dict[str, Any], told: str
) -> None:
    names = {"{wide}": "wide.onnx", "{good}": "good.onnx"}
    write_means(tmp_path / "wide.onnx", 16, shape=("B", 3, 16, 24))
    write_means(tmp_path / "good.onnx", 16)

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(value) for key, value in node.items()}
        if isinstance(node, list):
            return [filled(one) for one in node]
        return str(tmp_path / names[node]) if node in names else node

    with pytest.raises(LodesetError, match=told):
        before({**tree, **filled(section)})


def test_models_that_can_be_used_are_let_pass(tree: dict[str, Any], tmp_path: Path) -> None:
    write_means(tmp_path / "good.onnx", 16, batch=4)
    write_detector(tmp_path / "faces.onnx", 16, [(0, 0, 1, 1)], [0.001])
    classifier = {"name": "nsfw", "path": str(tmp_path / "good.onnx"), "index": 0, "keep": "below", "threshold": 0.5}
    section = {
        "embed": {"semantic": {"kind": "onnx", "path": str(tmp_path / "good.onnx")}},
        "filter": {"classifiers": [classifier], "faces": {"path": str(tmp_path / "faces.onnx")}},
    }
    assert "finished embed/pool" in before({**tree, **section})


def test_only_what_is_to_run_is_tried(tree: dict[str, Any], tmp_path: Path) -> None:
    write_means(tmp_path / "wide.onnx", 16, shape=("B", 3, 16, 24))
    section = {"embed": {"semantic": {"kind": "onnx", "path": str(tmp_path / "wide.onnx")}}}
    assert before({**tree, **section}, until="ingest") == ["finished ingest/pool"]


@pytest.mark.parametrize("until", [None, "evaluate", "embed"])
def test_targets_are_read_first_where_labels_are_wanted(
    tree: dict[str, Any], tmp_path: Path, until: str | None
) -> None:
    tree["targets"] = [{"name": "target", "uri": str(tmp_path / "t")}]
    ingested = target_set(Store(tree["store"]), tmp_path / "images", 24)["ingest/target"]

    def run(stages: Mapping[str, Stage], watch: Callable[[Event], None]) -> Mapping[str, Artifact]:
        assert list(stages) == ["ingest/target"]
        watch(Event("done", stages["ingest/target"], artifact=ingested))
        return {"ingest/target": ingested}

    told = before(tree, nothing_runs if until == "embed" else run, until)
    assert (told[0] == "done ingest/target") == (until != "embed")
    assert ("finished ingest/target" in told) == (until == "embed")  # told once
    assert "finished ingest/pool" in told
    if until == "embed":
        return
    for knobs, wrong in (
        ({"label": "kind"}, "none of its 12 images has kind"),
        ({"split": "fold"}, "no labeled image has fold"),
    ):
        with pytest.raises(LodesetError, match=wrong):
            before({**tree, "targets": [{**tree["targets"][0], **knobs}]}, run, until)
