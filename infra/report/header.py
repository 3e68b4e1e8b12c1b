"""The figures of the page's header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lodeset.infra.report import words
from lodeset.infra.report.contents import Report, Step


@dataclass(frozen=True)
class Tile:
    """One figure of the header."""

    value: str
    label: str


def flow(steps: Sequence[Step]) -> list[tuple[str, int]]:
    """(description, number of images) along the pool's way into the shards, as far as it went."""
    done = {(step.stage, step.set): step for step in steps if step.finished}
    way = (
        ("ingest", "pool", "files listed", "taken"),
        ("ingest", "pool", "distinct, readable images", "kept"),
        ("embed", "pool", "embedded", "kept"),
        ("filter", "pool", "left after the filter", "kept"),
        ("dedup", "pool", "left after dedup, with the images of included sets", "kept"),
        ("retrieve", "all", "selected", "kept"),
        ("write_shards", "all", "in shards", "kept"),
    )
    return [(what, int(getattr(done[stage, set_], field))) for stage, set_, what, field in way if (stage, set_) in done]


def tiles(report: Report) -> list[Tile]:
    """The figures of the header whose stages are finished."""
    figures = [
        Tile(words.count(n), what)
        for what, n in flow(report.steps)
        if what in ("files listed", "distinct, readable images")
    ]
    if report.dedup:
        dropped = report.dedup.dropped
        figures.append(Tile(words.count(dropped.get("near", 0)), "near-duplicates removed"))
        figures.append(Tile(words.count(dropped.get("reference", 0)), "leaks removed: images of reference sets"))
    if report.shards:
        figures.append(Tile(words.count(report.shards.images), "images in shards"))
    for scores in report.scores:
        for k, accuracy in list(scores.knn.get("trained", {}).items())[:1]:
            figures.append(Tile(words.percent(accuracy), f"kNN on {scores.target}, trained (k\u00a0=\u00a0{k})"))
    return figures
