"""Groups of near-duplicates, leaks into sets, and the calibration of the thresholds."""

from __future__ import annotations

from markupsafe import Markup

from lodeset.infra.report import charts
from lodeset.infra.report.contents import Calibration, Dedup
from lodeset.infra.report.section import Contents, Finished, Section, stored


def _collect(finished: Finished) -> Contents:
    calibration, dedup = finished.report.calibration, finished.report.dedup
    pictures: list[str] = []
    if dedup is not None:
        for group in (*dedup.largest, *dedup.drawn):
            pictures += [group.keeper, *(copy.image_id for copy in group.copies)]
        for pair in (*dedup.leaks, *dedup.included):
            pictures += [pair.image_id, pair.matched_id]
    return Contents(values={"calibration_chart": _calibration_chart(calibration, dedup)}, pictures=pictures)


def _calibration_chart(calibration: Calibration | None, dedup: Dedup | None) -> Markup:
    if calibration is None:
        return Markup("")
    spans = [charts.Span(k.kind, k.low, k.median, k.high, 1 if k.kind == "stranger" else 0) for k in calibration.kinds]
    marks = []
    if dedup is not None:
        marks = [
            charts.Mark("reference threshold", dedup.details.reference_threshold),
            charts.Mark("threshold", dedup.details.threshold),
        ]
    return charts.range_chart(spans, "cosine similarity to the original (10 % to 90 %, median)", marks)


SECTION = Section(
    id="near",
    title="Near-duplicates",
    collect=_collect,
    template=stored("near.html.jinja"),
)
