"""Cron expressions: which ones are accepted, when they come next, and how other schedulers write them.

cron, systemd and Kubernetes do not read the same language. Only what means the same to all of them is accepted.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from cronsim import CronSim, CronSimError

from lodeset.pipeline.errors import ConfigError

_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_FIELDS = ("minute", "hour", "day of the month", "month", "weekday")
_VALUE = r"(?:\d{1,2}|[A-Za-z]{3})"
_ITEM = re.compile(rf"(?P<range>\*|{_VALUE}(?P<to>-{_VALUE})?)(?P<step>/\d{{1,2}})?")
_WEEKDAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Cron:
    """A cron expression as five fields, and the values that each field allows (Sunday is 0)."""

    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]

    @property
    def either(self) -> bool:
        """Whether both the day of the month and the weekday are given: then a day that matches one of them counts."""
        _, _, day, _, weekday = self.text.split()
        return not day.startswith("*") and not weekday.startswith("*")


def parsed(text: str) -> Cron:
    """Read a cron expression.

    Raises:
        ConfigError: it is wrong, it never comes, or schedulers disagree on what it means.
    """
    fields = _MACROS.get(text.strip().lower(), text).split()
    if len(fields) != len(_FIELDS):
        wanted = "expected five fields (minute, hour, day of the month, month, weekday)"
        raise ConfigError(f'cron "{text}": {wanted}, e.g. "0 3 * * 1" for Mondays at 3:00')
    for name, field in zip(_FIELDS, fields, strict=True):
        _check(text, name, field)
    day, weekday = fields[2], fields[4]
    for starred, other in ((day, weekday), (weekday, day)):
        if starred.startswith("*/") and other != "*":
            raise ConfigError(
                f'cron "{text}": cron reads `{starred}` beside `{other}` as days that match both, Kubernetes as days '
                "that match either: list the days instead of using `*/`"
            )
    try:
        simulated = CronSim(" ".join(fields), _LONG_AGO)
        next(simulated)
    except (CronSimError, StopIteration) as error:
        why = str(error).removeprefix("Bad ") or "day"
        raise ConfigError(f'cron "{text}": the {why} is out of range, or there is no such day') from None
    weekdays = (value % 7 for value in simulated.weekdays if isinstance(value, int))
    return Cron(
        " ".join(fields),
        frozenset(simulated.minutes),
        frozenset(simulated.hours),
        frozenset(simulated.days),
        frozenset(simulated.months),
        frozenset(weekdays),
    )


def _check(text: str, name: str, field: str) -> None:
    """Raise ConfigError for what only some schedulers understand."""
    for item in field.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ConfigError(
                f'cron "{text}": the {name} `{field}` is not a list of numbers, ranges (1-5) and steps (*/15); other '
                "extensions of cron are not known to all schedulers"
            )
        if match["step"] and match["range"] != "*" and not match["to"]:
            raise ConfigError(
                f'cron "{text}": the {name} `{item}` has a step but no range, which cron refuses: write its end, too'
            )


def next_times(cron: Cron, zone: ZoneInfo, count: int = 3, after: datetime | None = None) -> tuple[datetime, ...]:
    """The next times, in that zone. Where clocks change, they are those of Debian's cron."""
    start = (after or datetime.now(UTC)).astimezone(zone)
    return tuple(itertools.islice(CronSim(cron.text, start), count))


def on_calendar(cron: Cron, zone: str | None) -> tuple[str, ...]:
    """The same times for systemd, one line for each `OnCalendar=`; without a zone, in that of the machine."""
    months = _listed(cron.months, 12)
    date = f"*-{months}-{_listed(cron.days, 31)}"
    weekdays = "" if len(cron.weekdays) == 7 else ",".join(_WEEKDAYS[day] for day in sorted(cron.weekdays)) + " "
    if not cron.either:
        days = [f"{weekdays}{date}"]
    elif len(cron.days) == 31 or not weekdays:
        days = [f"*-{months}-*"]
    else:
        # systemd wants a day to match everything in a line, and takes several lines as alternatives.
        days = [date, f"{weekdays}*-{months}-*"]
    times = f"{_listed(cron.hours, 24)}:{_listed(cron.minutes, 60)}:00"
    return tuple(f"{day} {times}" + (f" {zone}" if zone else "") for day in days)


def _listed(values: Collection[int], of: int) -> str:
    return "*" if len(values) == of else ",".join(f"{value:02}" for value in sorted(values))


def for_kubernetes(cron: Cron) -> str:
    """The expression as Kubernetes takes it, where Sunday is 0 only."""
    *others, weekday = cron.text.split()
    if "7" in weekday:
        weekday = "*" if len(cron.weekdays) == 7 else ",".join(str(day) for day in sorted(cron.weekdays))
    return " ".join((*others, weekday))


def zone_named(name: str) -> ZoneInfo:
    """A time zone by its name in the IANA database.

    Raises:
        ConfigError: there is no such time zone.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        near = difflib.get_close_matches(name, available_timezones(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ", such as Europe/Berlin or UTC"
        raise ConfigError(f"time zone {name}: not a name of the IANA database{hint}") from None


def system_zone() -> str:
    """The name of this machine's time zone, which cron and systemd go by whatever TZ is."""
    link = os.path.realpath("/etc/localtime").partition("/zoneinfo/")[2]
    names = [link]
    with contextlib.suppress(OSError):
        names.append(Path("/etc/timezone").read_text(encoding="utf-8").strip())
    return next((name for name in names if name in available_timezones()), "UTC")


def agree(one: ZoneInfo, other: ZoneInfo) -> bool:
    """Whether the clocks of two zones show the same time, every day of the next two years."""
    now = datetime.now(UTC)
    days = (now + timedelta(days=day) for day in range(730))
    return all(day.astimezone(one).utcoffset() == day.astimezone(other).utcoffset() for day in days)
