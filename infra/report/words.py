"""Format numbers, sizes, durations and dates for a page."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import humanize
from pydantic import TypeAdapter

from lodeset.pipeline.config import Cluster, Retrieve, Sample

_RETRIEVE: TypeAdapter[Retrieve] = TypeAdapter(Retrieve)
_BESIDE = {"neighbors", "pool_ids", "include"}  # what else the specification of `retrieve` holds


def count(value: float) -> str:
    return f"{value:,.0f}"


def compact(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return count(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def size(size_bytes: float) -> str:
    return humanize.naturalsize(size_bytes, binary=True)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else f"{minutes} min {rest} s"


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def tree(config: Mapping[str, object]) -> str:
    return json.dumps(dict(config), indent=2, ensure_ascii=False, default=str)


def asks(config: Mapping[str, object]) -> str:
    """How a curated set asks of the pool, by the configuration of its `retrieve`."""
    mode = _RETRIEVE.validate_python({key: value for key, value in config.items() if key not in _BESIDE})
    if isinstance(mode, Sample):
        return f"sample, k = {mode.k:,}"
    if isinstance(mode, Cluster):
        return f"cluster, {mode.per_cluster:,} of each with at least {mode.min_matches:,} queries"
    return "as it is"
