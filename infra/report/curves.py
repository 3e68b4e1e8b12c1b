"""The curves of a training: what it minimized, its schedules, signs of collapse, and its speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lodeset.infra.report import charts
from lodeset.infra.report.contents import Training

# Numbers of metrics.jsonl, and what their y axes are called.
LOSS_TERMS = {
    "loss": "total loss",
    "dino": "DINO term (image level), nats",
    "ibot": "iBOT term (patch level), nats",
    "koleo": "KoLeo term (spread)",
}
SCHEDULES = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "momentum": "momentum of the teacher",
    "teacher_temperature": "temperature of the teacher",
}
SIGNS_OF_COLLAPSE = {
    "teacher_entropy": "teacher entropy, nats",
    "feature_rank": "effective rank of features",
    "feature_std": "feature deviation (1 = spread)",
    "koleo_distance": "distance to nearest feature",
}
SPEED = {
    "images_per_s": "images/s",
    "gradient_norm": "norm of the gradient",
    "skipped": "images that could not be read",
}
ROWS = 12  # of the table below charts


@dataclass(frozen=True)
class Curves:
    """Some charts with one heading, and their figures as a table.

    Attributes:
        columns: the heads of the table.
        rows: at most ROWS of each run, spread over its steps: the run's name, the step, a number for each column (None: not
            recorded).
    """

    title: str
    told: str
    charts: Sequence[Markup]
    columns: Sequence[str]
    rows: Sequence[tuple[str, int, Sequence[float | None]]]


def curves(runs: Mapping[str, Training]) -> list[Curves]:
    """The curves of trainings, each under its name; the first one is solid, the others are dashed."""
    others = [name for run in runs.values() for name in run.summary.get("losses", {}) if name not in LOSS_TERMS]
    groups: Sequence[tuple[str, str, Mapping[str, str]]] = (
        ("Loss terms", "", LOSS_TERMS | {name: f"{name} term" for name in others}),
        ("Schedules", "", SCHEDULES),
        (
            "Signs of collapse",
            "The features of a collapsed network coincide: their rank and deviation are near the minimum.",
            SIGNS_OF_COLLAPSE,
        ),
        ("Speed and stability", "", SPEED),
    )
    found = (_group(title, told, wanted, runs) for title, told, wanted in groups)
    return [group for group in found if group.charts]


def _group(title: str, told: str, wanted: Mapping[str, str], runs: Mapping[str, Training]) -> Curves:
    recorded = {
        key: label for key, label in wanted.items() if any(key in line for r in runs.values() for line in r.lines)
    }
    # Nothing to see in a line that stays at zero.
    recorded = {
        k: v for k, v in recorded.items() if k != "skipped" or any(x.get(k) for r in runs.values() for x in r.lines)
    }
    drawn = [_chart(key, label, number, runs) for number, (key, label) in enumerate(recorded.items())]
    rows = [
        (name, int(line["step"]), [line.get(key) for key in recorded])
        for name, run in runs.items()
        for line in _some(run.lines)
    ]
    return Curves(title, told, [chart for chart in drawn if chart], list(recorded.values()), rows)


def _chart(key: str, label: str, number: int, runs: Mapping[str, Training]) -> Markup:
    styles: tuple[charts.Line, ...] = ("solid", "dashed")
    series = [
        charts.Series(
            name or label,
            [(line["step"], line[key]) for line in run.lines if key in line],
            (number + n) % charts.COLOURS if len(runs) == 1 else n % charts.COLOURS,
            styles[min(n, 1)],
        )
        for n, (name, run) in enumerate(runs.items())
    ]
    return charts.line_chart(series, "step", label)


def _some(lines: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if len(lines) <= ROWS:
        return lines
    return [lines[round(n * (len(lines) - 1) / (ROWS - 1))] for n in range(ROWS)]
