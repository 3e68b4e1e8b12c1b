"""Results of gates are kept in the store, beside the reports of runs.

```
<store>/gates/<run>/<number>.json    what an evaluation found; the last one counts
<store>/gates/<run>/<number>.md, .xml    the same for people and for CI systems
<store>/parts/gates/<key>/           the table `breaches` of it
```
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from lodeset.infra.gates.check import Result, Status
from lodeset.infra.gates.shown import junit, markdown
from lodeset.pipeline.dag.damage import Damage
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.manifests import parsed, sealed
from lodeset.pipeline.dag.store import Part, Store

if TYPE_CHECKING:
    import pyarrow as pa

# The stage is one by name alone: it has parts and no artifact.
FOLDER = STAGE = "gates"
TABLE = "breaches"


@dataclass(frozen=True)
class Outcome:
    """An evaluation of the gates of a configuration on a run.

    Attributes:
        run: the run; `accepted`: the one that it was compared with.
        at: when, UTC.
        conditions: those of each gate, by its name and their severity.
        breaches: the key of the part that holds the table `breaches`; None if no image is in it.
        pages: SHA-256 of the same as Markdown and as JUnit XML, by the ending of the file.
    """

    run: int
    accepted: int | None
    at: str
    status: Status
    conditions: Mapping[str, Mapping[str, str]]
    results: tuple[Result, ...]
    breaches: str | None
    pages: Mapping[str, str] = field(default_factory=dict)

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def count(self, status: Status) -> int:
        return sum(result.status == status for result in self.results)

    @property
    def said(self) -> str:
        """A line about all gates."""
        counts = [(self.count(one), one) for one in ("error", "warn", "ok", "not compared", "not reached")]
        against = "no accepted run" if self.accepted is None else f"run {self.accepted}, the accepted one"
        return f"{', '.join(f'{n} {one}' for n, one in counts if n)} (run {self.run} against {against})"


_OUTCOME = TypeAdapter(Outcome)


def keep(
    store: Store,
    run: int,
    accepted: int | None,
    at: str,
    status: Status,
    conditions: Mapping[str, Mapping[str, str]],
    results: Sequence[Result],
    breaches: pa.Table,
) -> Outcome:
    """Keeps the results and returns them; those of the evaluation before, where nothing is new."""
    key = None
    if breaches.num_rows:
        key = digest(STAGE, run, accepted, conditions, [asdict(result) for result in results])
        store.commit_part(STAGE, key, {TABLE: breaches})
    outcome = Outcome(run, accepted, at, status, dict(conditions), tuple(results), key)
    last, numbers = last_outcome(store, run), _numbers(store, run)
    if last is not None and asdict(replace(last, at=at, pages={})) == asdict(outcome):
        _put_pages(store, last, numbers[-1])
        return last
    digests = {suffix: hashlib.sha256(page).hexdigest() for suffix, page in _pages(outcome).items()}
    outcome = replace(outcome, pages=digests)
    while True:
        # After every file: pages may be left of results that were damaged.
        number = 1 + max(_numbers(store, run, (".json", ".md", ".xml")), default=0)
        if store.put_absent(_path(run, number, "json"), sealed(outcome.to_json())):
            _put_pages(store, outcome, number)
            return outcome


def _pages(outcome: Outcome) -> dict[str, bytes]:
    return {"md": markdown(outcome).encode(), "xml": junit(outcome)}


def _put_pages(store: Store, outcome: Outcome, number: int) -> None:
    """Puts the pages that are not there (they were damaged, or the process was killed)."""
    for suffix, page in _pages(outcome).items():
        if hashlib.sha256(page).hexdigest() == outcome.pages.get(suffix):
            store.put_absent(_path(outcome.run, number, suffix), page)


def damaged(store: Store) -> list[Damage]:
    """Results that are not what was written."""
    found = []
    for folder in store.names(FOLDER):
        for number in _numbers(store, int(folder)) if folder.isdecimal() else ():
            path = _path(int(folder), number, "json")
            try:
                outcome = parsed(_OUTCOME, store.read(path) or b"")
            except ValueError as error:
                found.append(Damage(path, str(error)))
                continue
            for suffix, digest_ in outcome.pages.items():
                path = _path(int(folder), number, suffix)
                data = store.read(path)
                if data is not None and hashlib.sha256(data).hexdigest() != digest_:
                    found.append(Damage(path, "its bytes are not those that were written (the SHA-256 differs)"))
    return found


def last_outcome(store: Store, run: int) -> Outcome | None:
    """The last evaluation of gates on a run; None if there is none."""
    found = (_read(store, run, number) for number in reversed(_numbers(store, run)))
    return next((one for one in found if one is not None), None)


def _read(store: Store, run: int, number: int) -> Outcome | None:
    data = store.read(_path(run, number, "json"))
    if data is None:
        return None
    try:
        return parsed(_OUTCOME, data)
    except ValueError as error:
        raise store.damaged(_path(run, number, "json"), str(error)) from error


def breaches_kept(store: Store, run: int) -> list[str]:
    """The keys of the parts with the table `breaches` of every evaluation of a run."""
    outcomes = (_read(store, run, number) for number in _numbers(store, run))
    return [one.breaches for one in outcomes if one is not None and one.breaches is not None]


def breaches_of(store: Store, outcome: Outcome | None) -> Part | None:
    """The part with the table `breaches` of an evaluation."""
    return store.part(STAGE, outcome.breaches) if outcome is not None and outcome.breaches is not None else None


def _numbers(store: Store, run: int, suffixes: tuple[str, ...] = (".json",)) -> list[int]:
    parts = (name.partition(".") for name in store.names(f"{FOLDER}/{run:06d}") if name.endswith(suffixes))
    return sorted({int(stem) for stem, _, _ in parts if stem.isdecimal()})


def _path(run: int, number: int, suffix: str) -> str:
    return f"{FOLDER}/{run:06d}/{number:04d}.{suffix}"
