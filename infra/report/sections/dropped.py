"""Examples of rejects and drops for each reason, and the scores of filters."""

from __future__ import annotations

from itertools import pairwise

from markupsafe import Markup

from lodeset.infra.report import charts
from lodeset.infra.report.contents import Scored
from lodeset.infra.report.reasons import explained
from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    report = finished.report
    values = {
        "reasons": explained(report),
        "score_charts": [(scored, _score_chart(scored)) for scored in report.scored],
    }
    return Contents(values=values, pictures=[image_id for dropped in report.dropped for image_id in dropped.image_ids])


def _score_chart(scored: Scored) -> Markup:
    bars = [
        (f"{charts.number(low)}–{charts.number(high)}", float(n))
        for (low, high), n in zip(pairwise(scored.edges), scored.counts, strict=True)
    ]
    return charts.bar_chart(bars, f"score of {scored.filter}", "images", width=max(320, 62 * len(bars)))


SECTION = Section(
    id="dropped",
    title="Rejects and drops",
    collect=_collect,
    template=stored("dropped.html.jinja"),
)
