"""Histograms of the scores of pixel filters, with the numbers that their thresholds drop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from lodeset.infra.report.charts import ticks
from lodeset.infra.report.contents import Scored
from lodeset.pipeline.dag.stage import Stage, read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.filters.masks import sides
from lodeset.pipeline.specs import ScoreSpec

BINS = 10  # approximate number; their edges are round


def scored(store: Store, stages: Mapping[str, Stage], artifacts: Mapping[str, Artifact]) -> tuple[Scored, ...]:
    """One entry per pixel filter, in the order of their names; empty if no filter looks at pixels."""
    scores_made, judging = artifacts.get("score/pool"), stages.get("filter/pool")
    if scores_made is None or judging is None or not judging.config:
        return ()
    by_filter: dict[str, list[Any]] = {name: [] for name in read_as(ScoreSpec, scores_made.config).scorers}
    for file in scores_made.tables["scores"]:
        table = store.table([file], ["filter", "score"])
        for name, values in by_filter.items():
            values.append(table["score"].filter(pc.equal(table["filter"], name)).to_numpy())
    joined = {name: np.concatenate(values) for name, values in by_filter.items() if values}
    kept = sides(judging.config)
    return tuple(_scored(name, values, *kept[name]) for name, values in sorted(joined.items()) if len(values))


def _scored(name: str, values: Any, threshold: float, keep: str) -> Scored:
    values = values.astype(np.float64)
    dropped = values < threshold if keep == "above" else values >= threshold
    low, high = float(values.min()), float(values.max())
    edges = ticks(0.0, 1.0, BINS + 1) if low >= 0 and high <= 1 else ticks(low, high, BINS + 1)
    counts = np.histogram(values, edges)[0]
    return Scored(name, keep, threshold, len(values), int(dropped.sum()), tuple(edges), tuple(int(n) for n in counts))
