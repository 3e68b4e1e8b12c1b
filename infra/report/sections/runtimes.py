"""How long stages took, and their configuration."""

from __future__ import annotations

from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    return Contents()


SECTION = Section(
    id="runtimes",
    title="Run times and configuration",
    collect=_collect,
    template=stored("runtimes.html.jinja"),
)
