"""What a store holds, as functions: the last finished run, or any, whatever became of its sources and configuration since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodeset.infra.config import read
from lodeset.infra.session import Opened
from lodeset.pipeline.errors import LodesetError

if TYPE_CHECKING:
    from rich.table import Table

    from lodeset.infra.looking.held import Held
    from lodeset.infra.looking.now import Now
    from lodeset.infra.looking.rows import Listed
    from lodeset.infra.looking.story import Traced
    from lodeset.infra.looking.summary import Summary
    from lodeset.infra.report.compared import Compared
    from lodeset.infra.upkeep.damage import Verified
    from lodeset.pipeline.dag.store import Artifact, Store


def held(opened: Opened, run: int | None = None) -> Held:
    """What the store holds of this configuration: its last finished run, or the one with this number.

    Raises:
        LodesetError: there is no such run.
    """
    from lodeset.infra.looking.held import held

    why = opened.missing[0] if opened.missing else ""
    return held(
        opened.store, opened.config, opened.stages, why=why, number=run, exactly=opened.overridden and run is None
    )


def status(opened: Opened, run: int | None = None) -> list[dict[str, Any]]:
    """One entry a stage and set of the last finished run (or of `run`), as `lodeset status --json` prints them."""
    shown = held(opened, run)
    return [_entry(opened.store, id_, shown.artifacts.get(id_)) for id_ in shown.ids]


def summary(opened: Opened, run: int | None = None) -> Summary:
    """Which run that is, what has changed since, and where its shards, models and report lie."""
    from lodeset.infra.looking.summary import summary

    return summary(opened.store, held(opened, run))


def now(opened: Opened) -> Now:
    """Whether a run of this data set is at work, or how the last one ended."""
    from lodeset.infra.looking.now import now

    return now(opened.store, opened.config.name, opened.config.ingest.limit)


def report(opened: Opened, path: str | Path, run: int | None = None, compare: int | None = None) -> Path:
    """Writes one self-contained HTML page of the last finished run, or of `run`, and returns its path. With `compare`, the page
    shows what differs from the run with that number.

    Raises:
        LodesetError: nothing is finished and `path` has a page already, the store lacks a file that a manifest lists, `path`
            cannot be written, or there is no such run to compare with.
    """
    from lodeset.infra.report.render import Beside, write_report

    shown = held(opened, run)
    if not shown.artifacts and Path(path).exists():
        raise LodesetError(f"no stage has finished in {opened.store.url}: {path} stays as it is; `lodeset run` first")
    beside = None
    if compare is not None:
        from lodeset.infra.report.compared import section

        beside = Beside(section(comparison(opened, compare, run)), held(opened, compare).artifacts)
    return write_report(
        opened.store, shown.stages(opened.stages), shown.artifacts, Path(path), title_of(opened), beside
    )


def report_text(opened: Opened, run: int | None = None, compare: int | None = None) -> list[Table | str]:
    """The report for terminals: headings and tables of the last finished run, or of `run`.

    Raises:
        LodesetError: the store lacks a file that a manifest lists, or there is no such run.
    """
    from lodeset.infra.report.collect import collect
    from lodeset.infra.report.text import lines_of

    shown = held(opened, run)
    contents = collect(opened.store, shown.stages(opened.stages), shown.artifacts)
    return lines_of(contents, comparison(opened, compare, run) if compare is not None else None)


def comparison(opened: Opened, compare: int, run: int | None = None) -> Compared:
    """The last finished run, or `run`, beside the run `compare`.

    Raises:
        LodesetError: there is no such run, or both are the same.
    """
    from lodeset.infra.report.compared import compared

    shown, before = held(opened, run), held(opened, compare)
    if shown.run is None:
        raise LodesetError(
            f"no run has finished in {opened.store.url}, so there is nothing to compare: `lodeset run` first"
        )
    if shown.run.number == compare:
        raise LodesetError(f"run {compare} would be compared with itself: choose another --compare or --run")
    return compared(opened, shown, before)


def title_of(opened: Opened) -> str:
    """What pages are called."""
    return opened.path.resolve().parent.name


def trace(opened: Opened, what: str, run: int | None = None) -> Traced:
    """What became of one image, or of one file that was refused: a sentence, and what each stage knows of it.

    `what` is an image_id or its first digits, a path, a URL, or a picture file.

    Raises:
        ConfigError: it stands for several images.
        LodesetError: no run of this configuration knows it.
    """
    from lodeset.infra.looking.story import traced

    shown = held(opened, run)
    folders = [Path.cwd(), opened.path.resolve().parent]
    before = shown.run.number if shown.run is not None else None
    return traced(opened.store, shown.artifacts, what, folders, opened.config.name, before)


def tables(opened: Opened, run: int | None = None) -> list[Listed]:
    """Every table of the last finished run, or of `run`, and `breaches` of its gates."""
    from lodeset.infra.gates.outcome import STAGE, breaches_of, last_outcome
    from lodeset.infra.looking.rows import listed, listed_part

    shown = held(opened, run)
    found = listed(opened.store, shown.artifacts)
    if shown.run is not None:
        breaches = breaches_of(opened.store, last_outcome(opened.store, shown.run.number))
        found += listed_part(opened.store, STAGE, breaches) if breaches is not None else []
    return found


def table(
    opened: Opened,
    name: str,
    *,
    of: str | None = None,
    where: Mapping[str, str] | None = None,
    rows: int = 20,
    to: str | Path | None = None,
    run: int | None = None,
) -> list[dict[str, Any]] | int:
    """The first rows of a table; or with `to` all of them into a file, and how many these are.

    Raises:
        ConfigError: no such table, column or format; or several stages have one.
        LodesetError: the file cannot be written.
    """
    from lodeset.infra.looking.rows import batches, chosen, first, write

    found = batches(opened.store, chosen(tables(opened, run), name, of), where or {})
    return first(found, rows) if to is None else write(found, Path(to))


def verify(path: str | Path, deep: bool = False, overrides: tuple[str, ...] = ()) -> Verified:
    """Looks for what is damaged in a configuration's store; the next run makes it again. `deep` reads every file. Sources and
    models need not be there.

    Raises:
        LodesetError: no store is there.
    """
    from lodeset.infra.upkeep.damage import verify
    from lodeset.pipeline.dag.store import Store

    store = Store(read(path, overrides).store)
    if not store.names("artifacts") and not store.names("parts"):
        raise LodesetError(f"nothing was made in {store.url} yet: is this the store of the configuration?")
    return verify(store, deep)


def _entry(store: Store, id_: str, artifact: Artifact | None) -> dict[str, Any]:
    name, _, set_ = id_.partition("/")
    known: dict[str, Any] = {"stage": name, "set": set_, "finished": artifact is not None}
    if artifact is None:
        return {**known, "manifest": None, "files": [], "tables": {}, "rows": None, "seconds": None, "details": {}}
    tables = {name: [store.full_url(f.path) for f in files] for name, files in artifact.tables.items()}
    rows = artifact.rows
    return {
        **known,
        "manifest": store.manifest_path(artifact),
        "files": [url for urls in tables.values() for url in urls],
        "tables": tables,
        "rows": {"in": rows.taken, "kept": rows.kept, "dropped": dict(rows.dropped)},
        "seconds": artifact.seconds,
        "details": dict(artifact.details),
    }
