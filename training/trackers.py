"""Where the metrics of a training run go besides `metrics.jsonl`: TensorBoard, MLflow, Weights & Biases.

A tracker that fails says so once, and training goes on. MLflow and W&B are called from a thread, since a server may take
minutes to answer; lines that do not fit its queue are left out.

A run that continues goes on with the same tracked run, whose id is kept beside the checkpoints. The steps since its
checkpoint are told again.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from tensorboardX import SummaryWriter

from lodeset.pipeline.shown import shown

EVENTS = "tensorboard"
IDS = "trackers.json"
PROJECT = "lodeset"  # unless the environment names another one
QUEUE = 1_000  # lines
CLOSE_S = 60.0
_PARAMETERS = 100  # that MLflow takes at once
_PARAMETER_LENGTH = 500  # characters; the limit of older servers


class Tracker(Protocol):
    """Takes the lines of `metrics.jsonl`. Any method may raise; nothing is lost but what the tracker shows."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None:
        """Writes to files what it holds back."""

    def close(self) -> None:
        """The run has reached its last step."""


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """The run as trackers know it.

    Attributes:
        folder: of this machine; what a tracker writes there is kept as long as the run.
        settings: what determines the run.
        resumed_step: the step that it goes on from.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    resumed_step: int

    def id_of(self, kind: str) -> str | None:
        """What the tracked run is called, if there is one."""
        try:
            found = json.loads((self.folder / IDS).read_text()).get(kind)
        except (OSError, ValueError, AttributeError):
            return None
        return found if isinstance(found, str) else None

    def remember(self, kind: str, id_: str) -> None:
        with _IDS_LOCK:
            known = {one: told for one in TRACKERS if (told := self.id_of(one)) is not None}
            temporary = self.folder / f"{IDS}.tmp"
            temporary.write_text(json.dumps({**known, kind: id_}, indent=1) + "\n")
            os.replace(temporary, self.folder / IDS)


_IDS_LOCK = threading.Lock()  # each tracker works in a thread of its own


def opened(kinds: Sequence[str], about: Tracked) -> list[Tracker]:
    """The trackers of these kinds; none of them raises."""
    return [Careful(kind, TRACKERS[kind], about) if kind == EVENTS else InBackground(kind, TRACKERS[kind], about) for kind in kinds]  # fmt: skip


class _Warned:
    """Says once that a tracker failed."""

    def __init__(self, kind: str) -> None:
        self.kind, self.told = kind, False

    def __call__(self, why: object) -> None:
        if not self.told:
            self.told = True
            logging.getLogger("lodeset").warning(
                "metrics do not reach %s (%s); training goes on, and metrics.jsonl has all of them",
                self.kind,
                shown(why),
            )


def _why(kind: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install 'lodeset[{kind}]'"
    return f"{type(error).__name__}: {error}"


class Careful:
    """A tracker that is called at once, and whose errors are told once."""

    def __init__(self, kind: str, make: Callable[[Tracked], Tracker], about: Tracked) -> None:
        self._kind, self._make, self._about = kind, make, about
        self._tracker: Tracker | None = None
        self._warned = _Warned(kind)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda tracker: tracker.log(step, values))

    def flush(self) -> None:
        self._try(lambda tracker: tracker.flush())

    def close(self) -> None:
        self._try(lambda tracker: tracker.close())

    def _try(self, call: Callable[[Tracker], None]) -> None:
        try:
            if self._tracker is None:
                self._tracker = self._make(self._about)
            call(self._tracker)
        except Exception as error:
            self._warned(_why(self._kind, error))


class InBackground:
    """The same in a thread: nobody waits for the tracker, until the run ends, and then for `CLOSE_S` at most."""

    def __init__(self, kind: str, make: Callable[[Tracked], Tracker], about: Tracked) -> None:
        self._tracker = Careful(kind, make, about)
        self._warned = self._tracker._warned
        self._lines: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._work, name=f"metrics to {kind}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self._lines.put_nowait((step, values))
        except queue.Full:
            self._warned(f"it is {QUEUE:,} lines behind: some are left out")

    def flush(self) -> None:
        """A server has what it was sent."""

    def close(self) -> None:
        end = time.monotonic() + CLOSE_S
        try:
            self._lines.put(None, timeout=CLOSE_S)
        except queue.Full:
            self._warned(f"it has not taken the last lines for {CLOSE_S:.0f} s")
            return
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._warned(f"it has not taken the last lines for {CLOSE_S:.0f} s")

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            self._tracker.log(*line)
        self._tracker.close()


class TensorBoard:
    """Events in `tensorboard/`; TensorBoard is told to forget the steps that are made again."""

    def __init__(self, about: Tracked) -> None:
        self._events = SummaryWriter(str(about.folder / EVENTS), purge_step=about.resumed_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME on the server MLFLOW_TRACKING_URI."""

    def __init__(self, about: Tracked) -> None:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            # MLflow's default is a file in the working directory, which of a worker nobody finds again.
            raise ValueError("set MLFLOW_TRACKING_URI")
        import mlflow.entities

        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        known = about.id_of("mlflow")
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        run = self._client.create_run(self._experiment(), run_name=about.name)
        self._id = str(run.info.run_id)
        about.remember("mlflow", self._id)
        parameters = [
            mlflow.entities.Param(name, str(value)[:_PARAMETER_LENGTH]) for name, value in _flat(about.settings).items()
        ]
        for start in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._id, params=parameters[start : start + _PARAMETERS])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(k, float(v), now, step) for k, v in values.items()])

    def flush(self) -> None:
        """Each line is sent at once."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


class WandB:
    """A run of the project WANDB_PROJECT; W&B is told the metrics and the settings, and nothing of the machine or the code."""

    def __init__(self, about: Tracked) -> None:
        import wandb

        known = about.id_of("wandb")
        id_ = known or uuid4().hex[:16]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=id_,
            resume="allow",
            name=about.name,
            config=dict(about.settings),
            dir=os.environ.get("WANDB_DIR") or str(about.folder),
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                silent=True,
            ),
        )
        if known is None:
            about.remember("wandb", id_)
        # W&B's own step only grows, and steps are made again after a loss.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """W&B sends in a process of its own."""

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {EVENTS: TensorBoard, "mlflow": MLflow, "wandb": WandB}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `crops.global_size: 64`."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
