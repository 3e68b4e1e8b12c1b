"""`gates`, `accept` and `rollback` as functions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lodeset.infra.session import Opened, data_set, keep
from lodeset.pipeline.errors import ConfigError, GateError, LodesetError

if TYPE_CHECKING:
    from lodeset.infra.gates.accepted import Accepted
    from lodeset.infra.gates.measure import Finished
    from lodeset.infra.gates.outcome import Outcome
    from lodeset.pipeline.dag.manifests import Run


class BreachedError(GateError):
    """A gate of the configuration was breached. The run is recorded, and its results are as they were made."""

    def __init__(self, outcome: Outcome) -> None:
        found = [result for result in outcome.results if result.status == "error"]
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        super().__init__(
            f"gate {found[0].gate} was breached{more}: {found[0].about}: {found[0].told}. Run {outcome.run} is recorded, and "
            "what it made stays: `lodeset gates` shows all gates, `lodeset rollback` goes back to an earlier run"
        )
        self.outcome = outcome


def gates(opened: Opened, run: int | None = None) -> Outcome:
    """Compares the last finished run, or the one with this number, with the gates of the configuration, and keeps what was found.
    Runs nothing.

    Raises:
        ConfigError: the configuration has no gates, or the run is one of another data set.
        LodesetError: there is no finished run.
    """
    if not opened.config.gates:
        raise ConfigError(
            f"{opened.path} has no gates: add a section `gates`, e.g. "
            '`gates: [{name: enough, measure: kept, error: "< 0.9 of accepted"}]`'
        )
    return evaluated(opened, _run_of(opened, run))


def evaluated(opened: Opened, run: Run) -> Outcome:
    """The gates of the configuration on a run; the results are kept in the store."""
    from lodeset.infra.gates.accepted import accepted
    from lodeset.infra.gates.check import compared, conditions_of, overall
    from lodeset.infra.gates.outcome import keep

    event = accepted(opened.store, run.name, run.limit)
    before = None if event is None else _finished(opened, opened.store.run(event.run))
    results, breaches = compared(opened.config.gates, _finished(opened, run), before)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    against = None if event is None else event.run
    conditions = conditions_of(opened.config.gates)
    return keep(opened.store, run.number, against, at, overall(results), conditions, results, breaches)


def accept(opened: Opened, run: int | None = None, by: str | None = None, why: str = "") -> Accepted:
    """Marks the last finished run, or the one with this number, as the one that `of accepted` means in gates.

    Raises:
        ConfigError: the run is one of another data set.
        LodesetError: there is no such run, or something that it made is gone.
    """
    from lodeset.infra.gates.accepted import accept

    return accept(opened.store, _run_of(opened, run), by, why)


def rollback(opened: Opened, run: int, by: str | None = None, why: str = "") -> Run:
    """Makes the artifacts of an earlier run, its shards among them, those that count, and returns the record of this. Deletes
    nothing: a rollback to the run before can follow.

    Raises:
        ConfigError: the run is one of another data set.
        LodesetError: it counts already, it made no shards, or something that it made is gone.
        HeldError: a run or a take-down is working on the store.
    """
    from lodeset.infra.upkeep.rollback import roll_back

    done = roll_back(opened.store, data_set(opened), run, by, why)
    keep(opened, done)
    return done


def _run_of(opened: Opened, number: int | None) -> Run:
    from lodeset.pipeline.dag.rollbacks import last_of

    data = data_set(opened)
    run = last_of(opened.store, data.name, data.limit) if number is None else opened.store.run(number)
    if run is None:
        raise LodesetError(f"{opened.store.url} has no finished run of {data}: `lodeset run {opened.path}` first")
    if (run.name, run.limit) != (data.name, data.limit):
        limit = "" if run.limit is None else f" with --limit {run.limit}"
        raise ConfigError(f"run {run.number} is one of {run.name}{limit}, and not of {data}")
    return run


def _finished(opened: Opened, run: Run) -> Finished:
    from lodeset.infra.gates.measure import Finished
    from lodeset.pipeline.dag.runs import artifacts_of

    artifacts = artifacts_of(opened.store, run)
    return Finished(store=opened.store, run=run, artifacts=artifacts, curated=opened.config.curated)
