"""What each curated set requested from the pool, and what it got."""

from __future__ import annotations

from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    queries = [query for one in finished.report.retrieved for query in one.queries]
    pictures = [image_id for one in queries for image_id in (one.query_id, *(hit for hit, _ in one.hits))]
    return Contents(pictures=pictures)


SECTION = Section(
    id="retrieval",
    title="Retrieval",
    needs=("retrieve/*",),
    collect=_collect,
    template=stored("retrieval.html.jinja"),
)
