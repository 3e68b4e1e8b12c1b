"""Metrics of a run: measures of its features, and every few steps a line of `metrics.jsonl`, which trackers get, too.

Shapes: n rows, D width, K prototypes.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lodeset.training.losses.koleo import nearest_distances
from lodeset.training.ssl import StepLosses
from lodeset.training.trackers import Tracker

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to `metrics.jsonl`, and tells the trackers.

    When it is opened at a resumed step, it first drops incomplete lines and those of later steps.
    """

    def __init__(self, folder: Path, resumed_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self.path = folder / FILE
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if (step := _step(line)) is not None and step <= resumed_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, self.path)
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        self.trackers = tuple(trackers)

    def append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        values = {name: value for name, value in line.items() if name != "step"}
        for tracker in self.trackers:
            tracker.log(line["step"], values)

    def flush(self) -> None:
        for tracker in self.trackers:
            tracker.flush()

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except json.JSONDecodeError:
        return None


@torch.no_grad()
def feature_metrics(step: StepLosses) -> dict[str, float]:
    """Signs of collapse, measured on one worker's share of a step.

    teacher_entropy: mean entropy of the teacher's targets, nats, if the objective has targets that are probabilities.
    koleo_distance: mean distance from the student's CLS features of the first global crop to the nearest other.
    feature_std: deviation of the teacher's L2-normalized CLS per channel, times sqrt(D): 1 if they spread over the
    sphere, 0 if they collapse (Chen & He 2021, arXiv:2011.10566). feature_rank: their effective rank (RankMe, Garrido
    et al. 2023, arXiv:2210.02885).
    """
    targets = step.teacher_targets
    teacher = F.normalize(step.teacher_cls, dim=-1)
    entropy = {} if targets is None else {"teacher_entropy": float(torch.special.entr(targets).sum(dim=-1).mean())}
    return {
        **entropy,
        "koleo_distance": float(nearest_distances(step.student_cls.chunk(2)[0]).mean()),
        "feature_std": float(teacher.std(dim=0).mean()) * math.sqrt(teacher.shape[1]),
        "feature_rank": effective_rank(teacher),
    }


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalized singular values of features [n, D]: 1 to min(n, D)."""
    singular = torch.linalg.svdvals(features.float())
    return float(torch.special.entr(singular / singular.sum()).sum().exp())
