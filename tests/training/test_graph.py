"""`train` and `evaluate` as stages, without an engine: what they list, and what is evaluated with and without training."""

import hashlib
import io
import json
import posixpath
from pathlib import Path
from typing import Any

import pytest
from builders import write_shards
from inline import artifact, ran, target_set, without_engine
from PIL import Image

from lodeset.pipeline.config import TargetSet
from lodeset.pipeline.dag.fingerprint import file_digest
from lodeset.pipeline.dag.stage import Context, Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.tables import records
from lodeset.training import graph
from lodeset.training.config import TrainingConfig
from lodeset.training.launch import train_inline
from lodeset.training.stages import evaluate, train

TARGET = TargetSet(name="target", uri="target/")
SIDE = 40
K = "8"  # of 8 gallery images


def never(context: Context) -> Outcome:
    raise AssertionError("only made by hand here")


CURATION = {
    id_: Stage(id_.split("/")[0], id_.split("/")[1], 1, "ray", never, {})
    for id_ in ("ingest/target", "embed/target", "retrieve/all", "write_shards/all")
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def scores(evaluated: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = evaluated.details["targets"]["target"]
    return found


def test_without_training_the_embedder_alone_is_evaluated(store: Store, tmp_path: Path) -> None:
    stages = graph.build(None, [TARGET], CURATION, SIDE**2)
    assert list(stages) == ["evaluate/all"]
    inputs = target_set(store, tmp_path / "target", SIDE)
    evaluated = ran(store, stages["evaluate/all"], inputs)
    linear = scores(evaluated).pop("linear")
    assert scores(evaluated) == {"knn": {"embedder": {K: 1.0}}, "gallery": 8, "test": 4, "classes": 2}
    assert linear["embedder"]["accuracy"] == 1.0 and linear["embedder"]["features"] == "vector"
    knn_alone = graph.build(None, [TARGET.model_copy(update={"linear_steps": 0})], CURATION, SIDE**2)["evaluate/all"]
    assert scores(ran(store, knn_alone, inputs))["linear"] == {}
    assert evaluated.rows == Rows(12, 12)
    assert graph.build(None, [], CURATION, SIDE**2) == {}


def test_vectors_that_do_not_cover_a_target_leave_the_embedder_out(store: Store, tmp_path: Path) -> None:
    stages = graph.build(None, [TARGET], CURATION, SIDE**2)
    inputs = target_set(store, tmp_path / "target", SIDE, slice(1, None))
    assert scores(ran(store, stages["evaluate/all"], inputs))["knn"] == {}


def test_training_lists_its_newest_checkpoint_and_its_limit_is_not_that_of_targets(
    store: Store, tmp_path: Path, payloads: list[bytes], small: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (train, evaluate):
        without_engine(module, monkeypatch)
    monkeypatch.setattr(
        train, "launch", lambda config, urls, folder, _, origin: train_inline(config, urls, folder, origin)
    )
    # The training images are 24 x 22 pixels at most; those of the target set are larger than training decodes.
    config = small.model_copy(update={"max_pixels": 24 * 22})
    stages = graph.build(config, [TARGET], CURATION, SIDE**2)
    index = write_shards(Path(store.path("shards")), payloads)
    index_file = File("shards/index.parquet", len(payloads), Path(index).stat().st_size, file_digest(index))
    files = {"index": (index_file,)}
    shards = artifact("write_shards", "all", Outcome(files, Rows(len(payloads), len(payloads))))
    trained = ran(store, stages["train/all"], {"write_shards/all": shards})
    newest = f"{trained.details['folder']}/step-{config.steps:07d}"
    marker, state = trained.tables["checkpoints"]
    assert marker.path == f"{newest}/manifest.json"
    assert posixpath.dirname(state.path) == newest and state.path.endswith(".safetensors")
    for file in trained.tables["checkpoints"]:
        data = Path(store.path(file.path)).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())

    # What is lost or damaged of it is made again, from its last checkpoint that is whole.
    for table in ("model", "checkpoints", "metrics"):
        for file in trained.tables[table]:
            path = Path(store.path(file.path))
            path.write_bytes(path.read_bytes()[:-1] + b"?") if table == "checkpoints" else path.unlink()
        again = ran(store, stages["train/all"], {"write_shards/all": shards})
        assert again.tables["model"] == trained.tables["model"], table
        for file in again.files():
            store.check(file)
        trained = again

    inputs = {"train/all": trained, **target_set(store, tmp_path / "target", SIDE)}
    evaluated = ran(store, stages["evaluate/all"], inputs)
    assert set(scores(evaluated)["knn"]) == {"trained", "untrained", "embedder"}
    assert set(scores(evaluated)["linear"]) == {"trained", "untrained", "embedder"}
    assert all(set(by_k) == {K} for by_k in scores(evaluated)["knn"].values())
    pictures = store.table(evaluated.tables["pictures"], None, records.PICTURES).to_pylist()
    assert [row["set"] for row in pictures] == ["target"] * 4 and {row["network"] for row in pictures} == {"trained"}
    assert all(Image.open(io.BytesIO(row["image"])).size == (64, 64) for row in pictures)  # twice the side of training
    assert all(Image.open(io.BytesIO(row["picture"])).size == (8, 8) for row in pictures)
    assert (evaluated.details["parts"], len(evaluated.tables["features"])) == (2, 2)
    assert json.loads(json.dumps(evaluated.details)) == evaluated.details


def test_weighed_sets_need_to_know_what_was_selected(small: TrainingConfig) -> None:
    plain, weighed = (
        graph.build(small.model_copy(update={"mix": mix}), [], CURATION, SIDE**2)["train/all"]
        for mix in ({}, {"flowers": 2.0})
    )
    assert {role: needed.stage.id for role, needed in plain.inputs.items()} == {"shards": "write_shards/all"}
    assert weighed.inputs["selected"].stage.id == "retrieve/all"
    assert "mix" not in plain.config and weighed.config["mix"] == {"flowers": 2.0}
