"""Losses and signs of collapse of every training."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from lodeset.infra.report import charts
from lodeset.infra.report.contents import Training
from lodeset.infra.report.section import Contents, Finished, Section, stored

# Curves of metrics.jsonl, and the labels of their y axes.
LOSS_TERMS = {
    "loss": "total loss",
    "dino": "DINO term (image level), nats",
    "ibot": "iBOT term (patch level), nats",
    "koleo": "KoLeo term (spread)",
}
SIGNS_OF_COLLAPSE = {
    "teacher_entropy": "teacher entropy, nats",
    "feature_rank": "effective rank of features",
    "feature_std": "feature deviation (1 = spread)",
    "koleo_distance": "distance to nearest feature",
}


def _collect(finished: Finished) -> Contents:
    training = finished.report.training
    values = {
        "loss_charts": [_curves(run, _losses(run)) for run in training],
        "collapse_charts": [_curves(run, SIGNS_OF_COLLAPSE) for run in training],
    }
    return Contents(values=values)


def _losses(training: Training) -> dict[str, str]:
    """The terms of DINOv2, and those of the objective that this run had."""
    others = [name for name in training.summary.get("losses", {}) if name not in LOSS_TERMS]
    return LOSS_TERMS | {name: f"{name} term" for name in others}


def _curves(training: Training, wanted: Mapping[str, str]) -> list[Markup]:
    drawn = []
    for number, (name, label) in enumerate(wanted.items()):
        colour = number % charts.COLOURS
        points = [(line["step"], line[name]) for line in training.lines if name in line]
        drawn.append(charts.line_chart([charts.Series(label, points, colour)], "step", label))
    return [chart for chart in drawn if chart]


SECTION = Section(
    id="training",
    title="Training",
    needs=("train/*", "finish/*", "distill/*"),
    collect=_collect,
    template=stored("training.html.jinja"),
)
