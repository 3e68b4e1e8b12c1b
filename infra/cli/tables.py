"""What the command line shows of a composition, of retrieval and of leaks, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lodeset.infra.cli.options import safe

if TYPE_CHECKING:
    from lodeset.infra.composition import Composition


def composition_tree(composed: Composition) -> dict[str, Any]:
    """The composition as `lodeset plan --json` prints it; null is not known."""
    expected = composed.expected
    return {
        "rows": [{**asdict(row), "difference": row.difference} for row in composed.rows],
        "final": composed.final,
        "expected": expected,
        "difference": None if expected is None or composed.unknown else composed.final - expected,
        "unknown": list(composed.unknown),
    }


def show_composition(out: Console, composed: Composition) -> None:
    """A row a set and way of coming in, and their sum."""
    told = composition_tree(composed)
    compared = any(row["expected"] is not None for row in told["rows"])
    table = Table("curated set", "mode", box=None, pad_edge=False)
    for heading in ("its images", "retrieved", "final", *(("expected", "difference") if compared else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("figures from")
    for row in told["rows"]:
        difference = (_figure(row["expected"]), _signed(row["difference"])) if compared else ()
        retrieved = "" if row["mode"] == "as_is" else _figure(row["retrieved"])
        figures = (_figure(row["images"]), retrieved, _figure(row["final"]))
        table.add_row(safe(row["set"]), row["mode"], *figures, *difference, row["basis"])
    difference = (_figure(told["expected"]), _signed(told["difference"])) if compared else ()
    without = f"without {', '.join(told['unknown'])}" if told["unknown"] else ""
    table.add_row("total", "", "", "", _figure(told["final"]), *difference, safe(without), style="bold")
    print_whole(out, table)
    out.print("a sum over rows: an image that several sets want counts in each", style="dim")


def show_retrieval(out: Console, entries: Sequence[Mapping[str, Any]]) -> None:
    """What each finished curated set asked and got (asked = distinct + collisions + short + capped), and who leaked."""
    done = {e["set"]: e["details"] for e in entries if e["stage"] == "retrieve" and e["finished"]}
    sets = {name: told for name, told in done.items() if name != "all" and told["asked"]}
    if sets:
        keys = ("asked", "distinct", "collisions", "short", "capped")
        table = Table("retrieved for", box=None, pad_edge=False)
        for heading in (*keys, "shared"):
            table.add_column(heading, justify="right", no_wrap=True)
        everything = done.get("all", {})
        shared = everything.get("shared_by_set", {})
        for name, told in sets.items():
            table.add_row(safe(name), *(_figure(told[key]) for key in keys), _figure(shared.get(name)))
        total = (sum(told[key] for told in sets.values()) for key in keys)
        table.add_row("all sets", *map(_figure, total), _figure(everything.get("shared")), style="bold")
        print_whole(out, table)
    for entry in entries:
        for name, leak in entry["details"].get("leaks", {}).items():
            out.print(
                f"{safe(name)} ({leak['role']}): {leak['dropped']:,} images dropped as copies of {leak['images']:,} of its images",
                highlight=False,
            )


def show_changes(out: Console, entries: Sequence[Mapping[str, Any]]) -> None:
    """What the shards hold since the run before, and hold no more."""
    for entry in entries:
        since = entry["details"].get("since")
        if since:
            told = [f"{_total(since[change])} {change}{_by_reason(since[change])}" for change in ("added", "removed")]
            written, dead = (entry["details"][f"{what}_bytes"] / 1e6 for what in ("written", "dead"))
            out.print(
                f"since the run before: {', '.join(told)}; {written:,.1f} MB of shards written, "
                f"{dead:,.1f} MB dead (`lodeset compact`)",
                highlight=False,
                soft_wrap=True,
            )


def _total(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values()):,}"


def _by_reason(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{safe(reason)} {count:,}' for reason, count in counts.items())})" if counts else ""


def print_whole(out: Console, table: Table) -> None:
    """As wide as it is: a name cut short, or a row over three lines, cannot be searched for in a file or a pipe."""
    table.width = Measurement.get(out, out.options.update(width=1_000), table).maximum
    show(out, table, soft_wrap=True)


def show(out: Console, table: Table, soft_wrap: bool = False) -> None:
    """A table; in a file or a pipe without the spaces that would fill its last column."""
    if out.is_terminal:
        out.print(table, soft_wrap=soft_wrap)
        return
    with out.capture() as written:
        out.print(table, soft_wrap=soft_wrap)
    for line in written.get().splitlines():
        out.print(line.rstrip(), markup=False, soft_wrap=True)


def _figure(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _signed(value: int | None) -> str:
    return "" if value is None else f"{value:+,}" if value else "0"
