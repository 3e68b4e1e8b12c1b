"""The rows of every stage: each row that goes in comes out or is dropped for a reason."""

from __future__ import annotations

from lodeset.infra.report.header import flow
from lodeset.infra.report.reasons import explained
from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    steps = finished.report.steps
    values = {
        "flow": flow(steps),
        "sets": list(dict.fromkeys(step.set for step in steps)),
        "seen_reasons": list(dict.fromkeys(reason for step in steps for reason in step.dropped)),
        "reasons": explained(finished.report),
    }
    return Contents(values=values)


SECTION = Section(
    id="funnel",
    title="Funnel",
    collect=_collect,
    template=stored("funnel.html.jinja"),
)
