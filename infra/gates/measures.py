"""The one list of measures. A new one is a function in a file of its own, and a line here."""

from __future__ import annotations

from collections.abc import Sequence

from lodeset.infra.gates.measure import Measure
from lodeset.pipeline.references import resolved

LISTED = (
    "lodeset.infra.gates.builtin:KEPT",
    "lodeset.infra.gates.builtin:KEPT_SHARE",
    "lodeset.infra.gates.builtin:DROPPED",
    "lodeset.infra.gates.builtin:DROPPED_SHARE",
    "lodeset.infra.gates.builtin:DUPLICATES",
    "lodeset.infra.gates.builtin:LEAKS",
    "lodeset.infra.gates.builtin:LEAKS_IN_SHARDS",
    "lodeset.infra.gates.builtin:DRIFT",
    "lodeset.infra.gates.builtin:SHORTFALL",
    "lodeset.infra.gates.builtin:UNFILLED",
    "lodeset.infra.gates.builtin:KNN",
    "lodeset.infra.gates.builtin:SECONDS",
    "lodeset.infra.gates.builtin:BYTES",
)

MEASURES: Sequence[Measure] = tuple(resolved(reference) for reference in LISTED)
BY_NAME = {measure.name: measure for measure in MEASURES}
