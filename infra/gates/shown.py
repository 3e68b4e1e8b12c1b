"""The results of gates as Markdown, for pull requests, and as JUnit XML, for CI systems."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

from lodeset.infra.gates.condition import written
from lodeset.pipeline.shown import shown

if TYPE_CHECKING:
    from lodeset.infra.gates.check import Result
    from lodeset.infra.gates.outcome import Outcome

MARKS = {"ok": "✅", "warn": "⚠️", "error": "❌", "not compared": "➖", "not reached": "➖"}


def markdown(outcome: Outcome) -> str:
    """A heading, a line about all gates, and a table."""
    lines = [
        f"## Gates of run {outcome.run}: {outcome.status}",
        "",
        outcome.said,
        "",
        "| | gate | measure | value | accepted | warn | error | |",
        "| --- | --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    for one in outcome.results:
        conditions = outcome.conditions.get(one.gate, {})
        cells = (
            f"{MARKS[one.status]} {one.status}",
            one.gate,
            one.about,
            _figure(one.value, one),
            _figure(one.accepted, one),
            _code(conditions.get("warn")),
            _code(conditions.get("error")),
            _told(one),
        )
        lines.append(f"| {' | '.join(cell if '`' in cell else _plain(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def junit(outcome: Outcome) -> bytes:
    """One test case a gate. A breached condition of `error` is a failure, what could not be measured an error, and what was not
    compared or not reached is skipped. JUnit knows no warnings: they are in the output of a case that passes."""
    errors = [one for one in outcome.results if one.status == "error"]
    counts = {
        "tests": len(outcome.results),
        "failures": sum(one.breached is not None for one in errors),
        "errors": sum(one.breached is None for one in errors),
        "skipped": outcome.count("not compared") + outcome.count("not reached"),
    }
    told = {"name": "lodeset gates", "timestamp": outcome.at, **{name: str(n) for name, n in counts.items()}}
    suite = ET.Element("testsuite", told)
    for one in outcome.results:
        case = ET.SubElement(suite, "testcase", classname=f"gates.{one.measure}", name=one.gate)
        said = shown(f"{one.about}: {_told(one)}")
        if one.status == "error":
            ET.SubElement(case, "failure" if one.breached else "error", message=said).text = said
        elif one.status in ("not compared", "not reached"):
            ET.SubElement(case, "skipped", message=said)
        else:
            ET.SubElement(case, "system-out").text = f"{one.status}: {said}"
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _told(one: Result) -> str:
    if one.images is None:
        return one.told
    kept = "" if one.kept == one.images else f", of which {one.kept:,} are kept"
    return f"{one.told}; {one.images:,} images{kept}: `lodeset table CONFIG breaches --where gate={one.gate}`"


def _figure(value: float | None, one: Result) -> str:
    return "" if value is None else written(value, one.unit)  # type: ignore[arg-type]  # it is that of a measure


def _code(condition: str | None) -> str:
    return "" if condition is None else f"`{condition}`"


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else, in a cell of a table."""
    return "".join(f"\\{c}" if c in r"\|<>*_[]#" else c for c in shown(text))
