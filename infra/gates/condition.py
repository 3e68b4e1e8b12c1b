"""The conditions of gates.

```
condition = comparison number [unit] ["of accepted"]
comparison = ">" | ">=" | "<" | "<=" | "==" | "!="
unit = "%" | "s" | "min" | "h" | "kB" | "MB" | "GB" | "TB"
```

A condition says what is wrong: `> 10` is breached by 11. With `of accepted`, the number is a share of what the last accepted run
has: `< 0.9 of accepted` and `< 90 % of accepted` are the same.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Unit = Literal["images", "share", "seconds", "bytes"]

FORM = r"\s*(>=|<=|==|!=|>|<)\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(%|[A-Za-z]+?)?\s*(of\s+accepted)?\s*"
EXAMPLES = '"> 10", "> 5 %", "> 2 h", "> 1.5 GB" or "< 0.9 of accepted"'
_COMPARED: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
# What each unit of a condition stands for, by the unit of what is measured.
_UNITS: Mapping[Unit, Mapping[str, float]] = {
    "images": {},
    "share": {"%": 0.01},
    "seconds": {"s": 1, "min": 60, "h": 3_600},
    "bytes": {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12},
}
_PERCENT = 0.01


@dataclass(frozen=True)
class Condition:
    """`factor` turns `number` into the unit of what is measured; `relative`: it is a share of what the accepted run has."""

    text: str
    comparison: str
    number: float
    unit: str
    relative: bool

    def limit(self, of: Unit, accepted: float | None) -> float:
        """What a value of this unit is compared with; `accepted` is that of the accepted run, which a relative one needs."""
        if self.relative:
            assert accepted is not None, "a relative condition is compared with an accepted run"
            return self.number * (_PERCENT if self.unit else 1) * accepted
        return self.number * _UNITS[of].get(self.unit, 1)

    def breached(self, value: float, of: Unit, accepted: float | None) -> bool:
        return _COMPARED[self.comparison](value, self.limit(of, accepted))


def parsed(text: str) -> Condition:
    """Raises ValueError: it is no condition; the message says what is."""
    match = re.fullmatch(FORM, text)
    if match is None:
        raise ValueError(f"expected a comparison and a number, e.g. {EXAMPLES}")
    comparison, number, unit, relative = match.groups()
    known = [name for units in _UNITS.values() for name in units]
    if unit is not None and unit not in known:
        raise ValueError(f"the unit `{unit}` is unknown: expected one of {', '.join(known)}, or none")
    if relative and unit not in (None, "%"):
        raise ValueError(
            f"`of accepted` takes a share, e.g. `< 0.9 of accepted` or `< 90 % of accepted`, and no {unit}"
        )
    return Condition(" ".join(text.split()), comparison, float(number), unit or "", relative is not None)


def misfit(condition: Condition, unit: Unit) -> str | None:
    """Why a condition says nothing about what is measured in this unit; None if it does."""
    if condition.relative or not condition.unit or condition.unit in _UNITS[unit]:
        return None
    allowed = ", ".join(_UNITS[unit])
    way = f"use {allowed}" if allowed else "use a plain number, or a measure of shares"
    return f"`{condition.text}`: what is measured are {_NAMED[unit]}: {way}"


_NAMED: Mapping[Unit, str] = {"images": "numbers of images", "share": "shares", "seconds": "seconds", "bytes": "bytes"}


def written(value: float, unit: Unit) -> str:
    """A value for people."""
    if unit == "images":
        return f"{value:,.0f}"
    if unit == "share":
        return f"{100 * value:.4g} %"
    if unit == "seconds":
        return f"{value:,.1f} s"
    for name, size in sorted(_UNITS["bytes"].items(), key=lambda unit: -unit[1]):
        if value >= size:
            return f"{value / size:.4g} {name}"
    return f"{value:,.0f} B"
