"""Print a composition, retrieval and leaks as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lodeset.infra.cli.options import safe
from lodeset.pipeline.by_hand import BY_HAND

if TYPE_CHECKING:
    from lodeset.infra.composition import Composition


def composition_tree(composed: Composition) -> dict[str, Any]:
    """The composition as `lodeset plan --json` prints it; null stands for unknown."""
    expected = composed.expected
    return {
        "rows": [{**asdict(row), "difference": row.difference} for row in composed.rows],
        "final": composed.final,
        "expected": expected,
        "difference": None if expected is None or composed.unknown else composed.final - expected,
        "unknown": list(composed.unknown),
    }


def show_composition(out: Console, composed: Composition) -> None:
    """A row per set and mode, and their sum."""
    tree = composition_tree(composed)
    compared = any(row["expected"] is not None for row in tree["rows"])
    table = Table("curated set", "mode", box=None, pad_edge=False)
    for heading in ("its images", "retrieved", "final", *(("expected", "difference") if compared else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("figures from")
    for row in tree["rows"]:
        difference = (_figure(row["expected"]), _signed(row["difference"])) if compared else ()
        retrieved = "" if row["mode"] in ("as_is", BY_HAND) else _figure(row["retrieved"])
        figures = (_figure(row["images"]), retrieved, _figure(row["final"]))
        table.add_row(safe(row["set"]), row["mode"], *figures, *difference, row["basis"])
    difference = (_figure(tree["expected"]), _signed(tree["difference"])) if compared else ()
    without = f"without {', '.join(tree['unknown'])}" if tree["unknown"] else ""
    table.add_row("total", "", "", "", _figure(tree["final"]), *difference, safe(without), style="bold")
    print_whole(out, table)
    out.print("sum over rows: an image that several sets select counts in each of them", style="dim")


def show_retrieval(out: Console, entries: Sequence[Mapping[str, Any]]) -> None:
    """What each finished curated set requested and got (asked = distinct + collisions + short + capped), and which
    leaks were removed.
    """
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
                f"{safe(name)} ({leak['role']}): {leak['dropped']:,} images dropped as copies of {leak['images']:,} "
                "of its images",
                highlight=False,
            )


def show_changes(out: Console, entries: Sequence[Mapping[str, Any]]) -> None:
    """How the content of the shards has changed since the previous run."""
    for entry in entries:
        since = entry["details"].get("since")
        if since:
            changes = [
                f"{_total(since[change])} {change}{_by_reason(since[change])}" for change in ("added", "removed")
            ]
            written, dead = (entry["details"][f"{what}_bytes"] / 1e6 for what in ("written", "dead"))
            out.print(
                f"since the previous run: {', '.join(changes)}; {written:,.1f} MB of shards written, "
                f"{dead:,.1f} MB no longer count (`lodeset compact`)",
                highlight=False,
                soft_wrap=True,
            )


def _total(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values()):,}"


def _by_reason(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{safe(reason)} {count:,}' for reason, count in counts.items())})" if counts else ""


def print_whole(out: Console, table: Table) -> None:
    """Print at full width: a truncated name, or a row over three lines, cannot be searched for in a file or a pipe."""
    table.width = Measurement.get(out, out.options.update(width=1_000), table).maximum
    show(out, table, soft_wrap=True)


def show(out: Console, table: Table, soft_wrap: bool = False) -> None:
    """Print a table; in a file or a pipe without the spaces that would pad its last column."""
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
