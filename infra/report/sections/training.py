"""Losses, schedules, signs of collapse and speed of every training."""

from __future__ import annotations

from lodeset.infra.report.curves import curves
from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    return Contents(values={"curves": [curves({"": run}) for run in finished.report.training]})


SECTION = Section(
    id="training",
    title="Training",
    needs=("train/*", "finish/*", "distill/*"),
    collect=_collect,
    template=stored("training.html.jinja"),
)
