"""Gates are compared with a finished run: what each found, and the images behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lodeset.infra.gates.condition import written
from lodeset.infra.gates.config import Gate
from lodeset.infra.gates.measure import Finished, Measured, NotComparable, NotMade

if TYPE_CHECKING:
    import pyarrow as pa

# ok: no condition is met. not compared: the accepted run, or an earlier one, is needed and there is none. not reached: the run was
# to stop before what is measured. error: a condition of `error` is met, or what is measured was not made.
Status = Literal["ok", "warn", "error", "not compared", "not reached"]
IMAGES_KEPT = 100_000  # of a gate


@dataclass(frozen=True)
class Result:
    """What one gate found.

    Attributes:
        value: what was measured, in `unit`; None if it could not be.
        accepted: the same of the accepted run; None if no condition needs it, or if there is none.
        breached: the condition that is met.
        told: one sentence.
        images: number of images behind a breached gate, if a table says which these are; `kept` of them are in `breaches`.
    """

    gate: str
    measure: str
    about: str
    unit: str
    status: Status
    value: float | None
    accepted: float | None
    breached: str | None
    told: str
    images: int | None = None
    kept: int = 0


def compared(gates: Sequence[Gate], run: Finished, accepted: Finished | None) -> tuple[list[Result], pa.Table]:
    """What each gate found, and the table `breaches`: the images behind those that are breached."""
    import pyarrow as pa

    from lodeset.pipeline.tables.records import BREACHES

    results, tables = [], [BREACHES.empty_table()]
    for gate in gates:
        try:
            measured = gate.measured.function(run, gate)
        except NotMade as error:
            results.append(_without(gate, "error" if error.reached else "not reached", str(error)))
            continue
        except NotComparable as error:
            results.append(_without(gate, "not compared", str(error)))
            continue
        result = _judged(gate, measured, accepted)
        if result.breached is not None and measured.images is not None:
            count, kept = 0, 0
            for block in measured.images():
                chosen = block[: IMAGES_KEPT - kept]
                count, kept = count + len(block), kept + len(chosen)
                rows = [pa.repeat(gate.name, len(chosen)), pa.array(chosen, pa.string())]
                tables.append(pa.table(rows, schema=BREACHES))
            result = Result(**{**vars(result), "images": count, "kept": kept})
        results.append(result)
    return results, pa.concat_tables(tables)


def overall(results: Sequence[Result]) -> Status:
    """The severest status; ok if nothing is wrong, though something could not be compared."""
    found = {result.status for result in results}
    return "error" if "error" in found else "warn" if "warn" in found else "ok"


def _without(gate: Gate, status: Status, why: str) -> Result:
    return Result(gate.name, gate.measure, gate.about, gate.measured.unit, status, None, None, None, why)


def _judged(gate: Gate, measured: Measured, accepted: Finished | None) -> Result:
    unit, value = gate.measured.unit, measured.value
    before, why = _of_accepted(gate, accepted)
    status: Status = "ok"
    breached, uncompared = None, None
    for severity, condition in gate.conditions.items():
        if condition.relative and before is None:
            uncompared = condition
        elif condition.breached(value, unit, before):
            status, breached = ("error" if severity == "error" else "warn"), condition
            break
    if breached is None and uncompared is not None:
        status = "not compared"
    said = written(value, unit) + (f" ({measured.about})" if measured.about else "")
    if breached is not None:
        limit = f" = {written(breached.limit(unit, before), unit)}" if breached.relative else ""
        said += f" {breached.text}{limit}"
    elif before is not None:
        said += f", accepted {written(before, unit)}"
    if uncompared is not None:
        said += f"; `{uncompared.text}` was not compared: {why}"
    if breached is not None and measured.see:
        said += f"; see `lodeset table CONFIG {measured.see}`"
    text = None if breached is None else breached.text
    return Result(gate.name, gate.measure, gate.about, unit, status, value, before, text, said)


def _of_accepted(gate: Gate, accepted: Finished | None) -> tuple[float | None, str]:
    """What the accepted run has, if a condition needs it, and else why there is nothing."""
    if not any(condition.relative for condition in gate.conditions.values()):
        return None, ""
    if accepted is None:
        return None, "no run is accepted (`lodeset accept`)"
    try:
        return gate.measured.function(accepted, gate).value, ""
    except (NotMade, NotComparable) as error:
        return None, f"in the accepted run, {error}"


def conditions_of(gates: Sequence[Gate]) -> Mapping[str, Mapping[str, str]]:
    """The conditions of each gate as they are written, by its name."""
    return {gate.name: {severity: one.text for severity, one in gate.conditions.items()} for gate in gates}
