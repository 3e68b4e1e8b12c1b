"""The shards that count, and the changes since the previous run."""

from __future__ import annotations

from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    return Contents()


SECTION = Section(
    id="shards",
    title="Shards",
    needs=("write_shards/*",),
    collect=_collect,
    template=stored("shards.html.jinja"),
)
