"""A configuration as an object: what the commands do, for notebooks and schedulers."""

from __future__ import annotations

import functools
import html
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lodeset.infra import session
from lodeset.infra.config import read
from lodeset.infra.looking import looking
from lodeset.infra.session import Opened
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown

if TYPE_CHECKING:
    import pyarrow as pa

    from lodeset.infra.card.card import Card
    from lodeset.infra.estimate import Estimate
    from lodeset.infra.gates.accepted import Accepted
    from lodeset.infra.gates.outcome import Outcome
    from lodeset.infra.jobs.follow import Ended
    from lodeset.infra.looking.now import Now
    from lodeset.infra.looking.story import Traced
    from lodeset.infra.looking.summary import Summary
    from lodeset.infra.upkeep.gc import Collected
    from lodeset.pipeline.dag.decisions import Decision
    from lodeset.pipeline.dag.runner import Event

Cells = Sequence[str]


def load(config: str | Path, *, overrides: Iterable[str] | Mapping[str, Any] = (), limit: int | None = None) -> Project:
    """See `lodeset.load`."""
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    project = Project(Path(config), tuple(overrides), limit)
    read(project.path, project.asked)  # now, not when it is first used
    return project


@dataclass(frozen=True)
class Project:
    """A configuration and its store. Every method reads them anew: what another process did in between counts.

    Every method raises `lodeset.LodesetError`, with one sentence that says what is wrong and the way out.
    """

    path: Path
    overrides: tuple[str, ...] = ()
    limit: int | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """The overrides, the limit among them."""
        return self.overrides if self.limit is None else (*self.overrides, f"ingest.limit={self.limit}")

    @property
    def store(self) -> str:
        """The URL of the store."""
        return self._looked().store.url

    @property
    def name(self) -> str:
        """The name of the data set."""
        return read(self.path, self.asked).name

    def metrics(self) -> str:
        """The state of the last attempt and the totals of the last finished run in Prometheus' text format."""
        from lodeset.infra.api import metrics

        return metrics(self._looked())

    def plan(self, *, until: str | None = None, fresh: bool = False) -> Plan:
        """What `run` would do, and why, with estimated seconds and bytes. Spends nothing."""
        from lodeset.infra.api import plan

        rows = plan(session.open_config(self.path, self.overrides, until, self.limit), fresh)
        return Plan.of(rows)

    def run(
        self,
        *,
        until: str | None = None,
        fresh: bool = False,
        watch: Callable[[Event], None] | None = None,
    ) -> Status:
        """Runs what is not finished, and shows progress: bars in a terminal or a notebook, lines elsewhere.

        If a gate of the configuration is breached, a LodesetError (`infra.gates.commands.BreachedError`) is raised after the run was
        recorded.

        Args:
            until: the last stage to run, e.g. "dedup".
            fresh: take nothing over from earlier runs.
            watch: is called with every event of the run, instead of a display.
        """
        opened = session.open_config(self.path, self.overrides, until, self.limit)
        with _watching(watch) as told:
            session.run(opened, told, fresh)
        return self.status()

    def submit(self, address: str, *, until: str | None = None, fresh: bool = False) -> str:
        """Runs on a Ray cluster, as a job, and returns the name of the job: of a new one, or of one of this run that is at work.

        Args:
            address: the dashboard of the cluster's head, e.g. "http://head:8265".
            until: as for `run`.
            fresh: as for `run`.
        """
        from lodeset.infra.jobs.bundle import resolved
        from lodeset.infra.jobs.client import Head
        from lodeset.infra.jobs.submit import Options, submit

        return submit(Head(address), resolved(self.path, self.asked), Options(until, fresh), _tell).job

    def follow(self, job: str, address: str) -> Ended:
        """Shows the log of a job until it has ended, and returns how it did."""
        from lodeset.infra.jobs.client import Head
        from lodeset.infra.jobs.follow import follow

        return follow(Head(address), job, _tell, _tell)

    def status(self, run: int | None = None) -> Status:
        """The last finished run, or the one with this number: what each stage took, kept and dropped, and why."""
        opened = self._looked()
        return Status(looking.summary(opened, run), tuple(looking.status(opened, run)), looking.now(opened))

    def now(self) -> Now:
        """Whether a run of this data set is at work, how far it is, what it waits for, or how the last one ended.

        Reads the run's own news and the claims; neither sources nor results.
        """
        from lodeset.infra.looking.now import now
        from lodeset.pipeline.dag.store import Store

        config = read(self.path, self.asked)
        return now(Store(config.store), config.name, config.ingest.limit)

    def gates(self, run: int | None = None) -> Outcome:
        """What the gates of the configuration say of the last finished run, or of the one with this number. Runs nothing."""
        from lodeset.infra.gates.commands import gates

        return gates(self._looked(), run)

    def accept(self, run: int | None = None, *, by: str | None = None, why: str = "") -> Accepted:
        """Marks the last finished run, or the one with this number, as the one that gates compare with."""
        from lodeset.infra.gates.commands import accept

        return accept(self._looked(), run, by, why)

    def rollback(self, run: int, *, by: str | None = None, why: str = "") -> Status:
        """Makes the artifacts of an earlier run, its shards among them, those that count."""
        from lodeset.infra.gates.commands import rollback

        rollback(self._looked(), run, by, why)
        return self.status()

    def report(self, path: str | Path = "report.html", run: int | None = None, compare: int | None = None) -> Path:
        """Writes the report of the last finished run, one self-contained HTML page, and returns its path.

        Args:
            run: the number of another run.
            compare: the number of a run that the page compares it with.
        """
        return looking.report(self._looked(), path, run, compare)

    def card(self, out: str | Path | None = None, run: int | None = None) -> Card:
        """Writes a Hugging Face dataset card and a Croissant file of the shards of the last finished run.

        Args:
            out: a folder for a copy of the shards; without it, they are written into the store.
            run: the number of another run.
        """
        from lodeset.infra.card.card import card

        return card(self._looked(), out, run)

    def trace(self, image: str | Path, run: int | None = None) -> Traced:
        """What became of an image: an image_id or its first digits, a path, a URL, or a picture file."""
        return looking.trace(self._looked(), str(image), run)

    def tables(self, run: int | None = None) -> dict[str, list[str]]:
        """The tables of the last finished run: name -> the stages that made one."""
        found: dict[str, list[str]] = {}
        for listed in looking.tables(self._looked(), run):
            found.setdefault(listed.table, []).append(listed.stage)
        return found

    def table(
        self, name: str, *, of: str | None = None, where: Mapping[str, str] | None = None, run: int | None = None
    ) -> pa.Table:
        """All rows of a table of the last finished run, e.g. `table("duplicates", where={"reason": "near"})`.

        Args:
            of: the stage that made it, where several made one of this name, e.g. "ingest/pool".
            where: only rows whose columns hold these values as text.
        """
        import pyarrow as pa

        from lodeset.infra.looking.rows import batches, chosen

        opened = self._looked()
        listed = chosen(looking.tables(opened, run), name, of)
        found = list(batches(opened.store, listed, where or {}))
        if not found:
            return opened.store.table(listed[0].files[:1]).slice(0, 0)
        return pa.concat_tables(found, promote_options="permissive")

    def dataset(self, run: int | None = None) -> Dataset:
        """The shards of the last finished run that hold images which count, as a list of URLs."""
        opened = self._looked()
        written = looking.held(opened, run).artifacts.get("write_shards/all")
        if written is None:
            raise LodesetError(f"no finished run of {self.path} has written shards: run it first")
        urls = (opened.store.full_url(file.path) for file in written.tables["shards"])
        return Dataset(urls, images=written.rows.kept)

    def gc(self, *, keep: int = 10, older_than_days: float = 1.0, dry_run: bool = False) -> Collected:
        """Deletes what none of the last `keep` runs of any data set in the store needs.

        What no run has on record stays until it has not changed for `older_than_days`. With `dry_run` nothing is deleted.
        """
        from lodeset.infra.api import gc

        return gc(self._looked(), keep, older_than_days * 86_400, dry_run)

    def neighbors(self, image: Any, k: int = 10) -> pa.Table:
        """The k pool images of the last finished run that are most similar to an image.

        Args:
            image: an image_id or its first digits, a path, a URL that the run knows, or a `PIL.Image.Image`. Files and
                pictures that the run does not know are embedded first.

        Returns:
            image_id, similarity (cosine), falling; without the image itself.
        """
        from lodeset.infra.looking.neighbors import neighbors

        return neighbors(self._looked(), image, k)

    def _looked(self) -> Opened:
        return session.open_store(self.path, self.overrides, self.limit)

    def __repr__(self) -> str:
        above = f", {len(self.asked)} overrides" if self.asked else ""
        return f"Project({str(self.path)!r}, store {shown(self.store)}{above})"


def _tell(text: str) -> None:
    print(shown(text, lines=True), file=sys.stderr)


@contextmanager
def _watching(watch: Callable[[Event], None] | None) -> Iterator[Callable[[Event], None]]:
    if watch is not None:
        yield watch
        return
    from lodeset.infra.cli.progress import watching

    with watching(Console(stderr=True)) as told:
        yield told


class Dataset(list[str]):
    """URLs of WebDataset shards, for `webdataset.WebDataset(dataset)` or `ray.data.read_webdataset(list(dataset))`.

    An old shard may still hold images that no longer count: `index.parquet` beside the newest shards says which do.
    """

    def __init__(self, urls: Iterable[str], *, images: int) -> None:
        super().__init__(urls)
        self.images = images

    def __repr__(self) -> str:
        return f"Dataset({len(self)} shards, {self.images:,} images)"


@dataclass(frozen=True)
class Planned:
    """One stage of a plan; `seconds` and `size_bytes` are estimates, None where nothing is known or nothing runs."""

    stage: str
    action: str
    reason: str
    images: int | None
    seconds: float | None
    size_bytes: int | None


@dataclass(frozen=True)
class Plan(Sequence[Planned]):
    """What a run would do, stage by stage."""

    rows: tuple[Planned, ...]

    @classmethod
    def of(cls, rows: Iterable[tuple[Decision, Estimate]]) -> Plan:
        """From what `infra.api.plan` returns."""
        return cls(
            tuple(
                Planned(
                    stage=decision.stage.id,
                    action="run" if decision.action == "wait" else decision.action,
                    reason=decision.reason,
                    images=estimate.images,
                    seconds=None if decision.artifact else estimate.seconds,
                    size_bytes=None if decision.artifact else estimate.size_bytes,
                )
                for decision, estimate in rows
            )
        )

    @property
    def to_run(self) -> tuple[str, ...]:
        """The ids of the stages that would run."""
        return tuple(row.stage for row in self.rows if row.action == "run")

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def _cells(self) -> list[Cells]:
        return [
            ("stage", "action", "why", "images", "seconds"),
            *(
                (row.stage, row.action, row.reason, _number(row.images), _number(row.seconds and round(row.seconds)))
                for row in self.rows
            ),
        ]

    def __repr__(self) -> str:
        return _text(self._cells)

    def _repr_html_(self) -> str:
        return _html(self._cells)


@dataclass(frozen=True)
class Status:
    """A finished run: `stages` as `lodeset status --json` lists them, where its results lie, and the last attempt to run."""

    summary: Summary
    stages: tuple[Mapping[str, Any], ...]
    now: Now

    def __getitem__(self, id_: str) -> Mapping[str, Any]:
        """The entry of a stage, e.g. `status["dedup/pool"]`."""
        for entry in self.stages:
            if f"{entry['stage']}/{entry['set']}" == id_:
                return entry
        raise KeyError(id_)

    @functools.cached_property
    def _cells(self) -> list[Cells]:
        rows: list[Cells] = [("stage", "in", "kept", "dropped", "seconds")]
        for entry in self.stages:
            counted = entry["rows"] or {"in": None, "kept": None, "dropped": {}}
            dropped = ", ".join(f"{reason} {count:,}" for reason, count in counted["dropped"].items())
            seconds = entry["seconds"] and round(entry["seconds"])
            rows.append(
                (
                    f"{entry['stage']}/{entry['set']}",
                    _number(counted["in"]),
                    _number(counted["kept"]),
                    dropped,
                    _number(seconds),
                )
            )
        return rows

    @property
    def _head(self) -> str:
        told = self.summary
        if told.run is None:
            return "no finished run is on record"
        return f"run {told.run}, finished {told.finished}; shards: {told.shards or 'none'}"

    def __repr__(self) -> str:
        return f"{shown(self._head)}\n{_text(self._cells)}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(shown(self._head))}</p>{_html(self._cells)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _text(rows: Sequence[Cells]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(shown(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return os.linesep.join(line.rstrip() for line in lines)


def _html(rows: Sequence[Cells]) -> str:
    head, *body = (["".join(f"<{tag}>{html.escape(shown(cell))}</{tag}>" for cell in row)]
                   for tag, row in zip(("th", *["td"] * (len(rows) - 1)), rows, strict=True))  # fmt: skip
    return f"<table><tr>{head[0]}</tr>{''.join(f'<tr>{row[0]}</tr>' for row in body)}</table>"
