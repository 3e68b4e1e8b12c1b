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
    """(what, how many images) of the pool's way into the shards, as far as it went."""
    done = {(step.stage, step.set): step for step in steps if step.finished}
    way = (
        ("ingest", "pool", "files listed", "taken"),
        ("ingest", "pool", "distinct, readable images", "kept"),
        ("embed", "pool", "embedded", "kept"),
        ("filter", "pool", "left by the filter", "kept"),
        ("dedup", "pool", "left by dedup, with the images of included sets", "kept"),
        ("retrieve", "all", "selected", "kept"),
        ("write_shards", "all", "in shards", "kept"),
    )
    return [(what, int(getattr(done[stage, set_], field))) for stage, set_, what, field in way if (stage, set_) in done]


def tiles(report: Report) -> list[Tile]:
    """The header's figures, as far as their stages are finished."""
    found = [
        Tile(words.count(n), what)
        for what, n in flow(report.steps)
        if what in ("files listed", "distinct, readable images")
    ]
    if report.dedup:
        dropped = report.dedup.dropped
        found.append(Tile(words.count(dropped.get("near", 0)), "near-duplicates removed"))
        found.append(Tile(words.count(dropped.get("reference", 0)), "leaks removed: images that reference sets hold"))
    if report.shards:
        found.append(Tile(words.count(report.shards.images), "images in shards"))
    for scores in report.scores:
        for k, accuracy in list(scores.knn.get("trained", {}).items())[:1]:
            found.append(Tile(words.percent(accuracy), f"kNN on {scores.target}, trained (k\u00a0=\u00a0{k})"))
    return found
