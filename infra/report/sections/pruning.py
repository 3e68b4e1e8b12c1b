"""Pruning jobs, with a chart and a table each."""

from __future__ import annotations

from lodeset.infra.report.pruned import drawn, smallest_k
from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    jobs = [drawn(report, finished.store.read) for report in finished.report.pruned]
    return Contents(values={"jobs": jobs, "smallest_k": smallest_k})


SECTION = Section(
    id="pruning",
    title="Pruning",
    needs=("prune/*",),
    collect=_collect,
    template=stored("pruning.html.jinja"),
)
