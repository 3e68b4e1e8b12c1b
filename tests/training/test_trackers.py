"""Trackers get the metrics of a run, a run that continues goes on with the same one, and none of them holds training up."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lodeset.training import trackers
from lodeset.training.config import TrainingConfig, identity_of
from lodeset.training.metrics import MetricsLog
from lodeset.training.trackers import IDS, Careful, InBackground, Tracked, Tracker, opened


def about(folder: Path, step: int = 0) -> Tracked:
    return Tracked(folder=folder, name="a run", settings={"steps": 4, "crops": {"size": 32}}, resumed_step=step)


def trained(folder: Path, kinds: list[str], steps: range) -> None:
    """Logs some steps, after those that a checkpoint has."""
    log = MetricsLog(folder, steps.start - 1, opened(kinds, about(folder, steps.start - 1)))
    for step in steps:
        log.append({"step": step, "loss": 1 / step})
    log.close()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("lodeset"), "propagate", True)
    caplog.set_level(logging.WARNING, "lodeset")
    return caplog


def test_trackers_are_no_part_of_what_a_run_is() -> None:
    assert TrainingConfig().trackers == ("tensorboard",)
    tracked = TrainingConfig.model_validate({"trackers": ["mlflow", "wandb"]})
    assert identity_of(tracked) == identity_of(TrainingConfig()) and "trackers" not in identity_of(tracked)


def test_without_trackers_there_are_lines_alone(tmp_path: Path) -> None:
    trained(tmp_path, [], range(1, 3))
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.jsonl"]
    trained(tmp_path, ["tensorboard"], range(3, 5))
    assert {one.name for one in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


class Broken:
    def __init__(self, about: Tracked) -> None:
        pass

    def log(self, step: int, values: Mapping[str, float]) -> None:
        raise OSError("no route to https://user:hunter2@host/")

    flush = close = lambda self: (_ for _ in ()).throw(OSError("no route"))


class Waiting:
    """A server that does not answer until `answers` is set."""

    answers = threading.Event()

    def __init__(self, about: Tracked) -> None:
        self.answers.wait(60)

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("how", [Careful, InBackground])
def test_a_tracker_that_fails_says_so_once(how: Any, tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    tracker: Tracker = how("mlflow", Broken, about(tmp_path))
    log = MetricsLog(tmp_path, 0, [tracker])
    for step in range(1, 5):
        log.append({"step": step, "loss": 0.5})
    log.flush()
    log.close()
    (record,) = told.records
    assert (
        "metrics do not reach mlflow (OSError: no route to https://***@host/); training goes on" in record.getMessage()
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_nobody_waits_for_a_server(
    tmp_path: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    monkeypatch.setattr(trackers, "QUEUE", 10)
    tracker = InBackground("wandb", Waiting, about(tmp_path))
    began = time.monotonic()
    for step in range(1, 1_000):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    assert time.monotonic() - began < 10  # the server would take 60 s
    Waiting.answers.set()
    (record,) = told.records
    assert "metrics do not reach wandb (it is 10 lines behind: some are left out)" in record.getMessage()


def test_what_is_not_installed_or_set_is_named(
    tmp_path: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trained(tmp_path, ["wandb", "mlflow"], range(1, 3))
    said = sorted(record.getMessage() for record in told.records)
    assert len(said) == 2 and "mlflow (ValueError: set MLFLOW_TRACKING_URI)" in said[0]
    assert "wandb is not installed: pip install 'lodeset[wandb]'" in said[1]


# -- what MLflow and W&B are told, by their documented functions


class Client:
    """Of MLflow."""

    runs: dict[str, dict[str, Any]]
    experiments: dict[str, str]

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = str(len(self.experiments))
        return self.experiments[name]

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        run_id = f"run-{len(self.runs)}"
        self.runs[run_id] = {"experiment": experiment_id, "status": "RUNNING", "params": {}, "loss": []}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self.runs[run_id]["loss"] += [(one.step, one.value) for one in metrics if one.key == "loss"]
        self.runs[run_id]["params"] |= {one.key: one.value for one in params}

    def set_terminated(self, run_id: str) -> None:
        self.update_run(run_id, "FINISHED")


def mlflow_of(client: type[Client]) -> dict[str, ModuleType]:
    mlflow, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    entities.__dict__["Metric"] = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
    entities.__dict__["Param"] = lambda key, value: SimpleNamespace(key=key, value=value)
    mlflow.__dict__.update(MlflowClient=client, entities=entities)
    return {"mlflow": mlflow, "mlflow.entities": entities}


def test_mlflow_is_told_one_run_by_a_run_that_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    monkeypatch.setattr(Client, "runs", {}, raising=False)
    monkeypatch.setattr(Client, "experiments", {}, raising=False)
    for name, module in mlflow_of(Client).items():
        monkeypatch.setitem(sys.modules, name, module)
    trained(tmp_path, ["mlflow"], range(1, 4))
    trained(tmp_path, ["mlflow"], range(3, 5))  # step 3 came after the checkpoint
    (run,) = Client.runs.values()
    assert run["loss"] == [(step, 1 / step) for step in (1, 2, 3, 3, 4)]
    assert run["params"] == {"steps": "4", "crops.size": "32"} and run["status"] == "FINISHED"
    assert Client.experiments == {"lodeset": run["experiment"]}


def test_wandb_is_told_one_run_by_a_run_that_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    lines: list[dict[str, float]] = []

    def init(**asked: Any) -> Any:
        begun.append(asked)
        return SimpleNamespace(define_metric=lambda name, step_metric: None, log=lines.append, finish=lambda: None)

    wandb = ModuleType("wandb")
    wandb.__dict__.update(init=init, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    trained(tmp_path, ["wandb"], range(1, 4))
    trained(tmp_path, ["wandb"], range(3, 5))
    first, second = begun
    assert first["id"] == second["id"] == json.loads((tmp_path / IDS).read_text())["wandb"]
    assert (first["resume"], first["project"], first["dir"]) == ("allow", "lodeset", str(tmp_path))
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4] and lines[0]["loss"] == 1.0


# -- the libraries themselves, without a network

TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trackers import trained
trained(Path({folder!r}), [{kind!r}], range(1, 4))
trained(Path({folder!r}), [{kind!r}], range(3, 5))
"""


def run_with(kind: str, folder: Path, **environment: str) -> str:
    folder.mkdir()
    program = TRAIN.format(tests=str(Path(__file__).parent), folder=str(folder), kind=kind)
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "do not reach" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.skipif(find_spec("mlflow") is None, reason="the mlflow extra is not installed")
def test_mlflow_keeps_it_in_files(tmp_path: Path) -> None:
    run_with("mlflow", tmp_path / "run", MLFLOW_TRACKING_URI=f"file://{tmp_path}/kept", MLFLOW_ALLOW_FILE_STORE="true")
    (losses,) = (tmp_path / "kept").glob("*/*/metrics/loss")
    assert [int(line.split()[2]) for line in losses.read_text().splitlines()] == [1, 2, 3, 3, 4]
    assert (losses.parents[1] / "params/crops.size").read_text() == "32"


@pytest.mark.skipif(find_spec("wandb") is None, reason="the wandb extra is not installed")
def test_wandb_keeps_it_offline(tmp_path: Path) -> None:
    run_with("wandb", tmp_path / "run", WANDB_MODE="offline", WANDB_DIR="", HOME=str(tmp_path))
    id_ = json.loads((tmp_path / "run" / IDS).read_text())["wandb"]
    kept = list(tmp_path.rglob("*.wandb"))
    assert len(kept) == 2 and {one.name for one in kept} == {f"run-{id_}.wandb"}
