"""The command line. Results go to standard output, logs to standard error.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 a gate was breached, 4 held by another run or by a rollback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import humanize
import typer
from rich.table import Table

from lodeset.infra import api
from lodeset.infra.cli.audit import audit_commands
from lodeset.infra.cli.card import card_commands
from lodeset.infra.cli.command import Group
from lodeset.infra.cli.deploy import deploy
from lodeset.infra.cli.gates import gates_commands, show_gates
from lodeset.infra.cli.inspect import inspect_commands, made_of
from lodeset.infra.cli.jobs import jobs, submitting
from lodeset.infra.cli.models import models
from lodeset.infra.cli.options import Json, Set, err, out, print_json, safe
from lodeset.infra.cli.rejects import reject_commands
from lodeset.infra.cli.status import show_status, status_commands
from lodeset.infra.cli.store import RunNumber, store_commands
from lodeset.infra.cli.tables import composition_tree, show, show_composition
from lodeset.infra.project import Project
from lodeset.pipeline.errors import ConfigError, LodesetError

app = typer.Typer(
    cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
app.add_typer(models)
app.add_typer(status_commands)
app.add_typer(reject_commands)
app.add_typer(store_commands)
app.add_typer(card_commands)
app.add_typer(audit_commands)
app.add_typer(deploy)
app.add_typer(submitting)
app.add_typer(jobs, name="jobs")
app.add_typer(gates_commands)
app.add_typer(inspect_commands)
MISSING_SHOWN = 5  # number of missing sources that `plan` lists

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="configuration file (`lodeset init` writes one)")]
Until = Annotated[str | None, typer.Option(help="stop after this stage, e.g. dedup")]
Limit = Annotated[int | None, typer.Option(min=1, help="first draw a seeded sample of N pool images")]
Fresh = Annotated[bool, typer.Option("--fresh", help="ignore everything that earlier runs fitted")]


class Logs(StrEnum):
    """How a run tells what it does."""

    text = "text"
    json = "json"


def _version(asked: bool) -> None:
    if asked:
        print(f"lodeset {version('lodeset')}")
        raise typer.Exit


@app.callback()
def lodeset(
    show_version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Turn a pile of uncurated images into a pretrained, pruned vision model."""


def _project(config: Path, set_: list[str] | None, limit: int | None) -> Project:
    return Project(config, tuple(set_ or ()), limit)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="file to write")] = Path("lodeset.yaml"),
    force: Annotated[bool, typer.Option("--force", help="overwrite an existing file")] = False,
    as_json: Json = False,
) -> None:
    """Write a configuration file with comments."""
    target = api.init(path, force)
    if as_json:
        print_json({"path": str(target)})
    else:
        out.print(f"wrote {safe(target)}: set `pool`, then `lodeset plan {safe(target)}`", highlight=False)


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON schema of the configuration (always JSON), for editors."""
    print_json(api.schema())


@app.command()
def plan(
    config: ConfigPath,
    set_: Set = None,
    until: Until = None,
    limit: Limit = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Show what would run and why, with estimated time and bytes; runs nothing."""
    opened = api.open_config(config, tuple(set_ or ()), until, limit, without_sources=True)
    rows, composed = api.plan(opened, fresh), api.composition(opened)
    if as_json:
        print_json(
            {
                "stages": [
                    {"stage": d.stage.name, "set": d.stage.set, "action": d.action, "reason": d.reason, "images": e.images,
                     "images_guessed": e.images_guessed, "seconds": e.seconds, "size_bytes": e.size_bytes}
                    for d, e in rows
                ],
                "composition": composition_tree(composed),
                "missing": list(opened.missing),
                "refused": None if fresh else api.refused(opened, [decision for decision, _ in rows]),
            }
        )  # fmt: skip
        return
    if composed.known:
        show_composition(out, composed)
    if opened.missing:
        _show_missing(opened.missing)
        return
    table = Table("stage", "action", "why", "images", "time", "stores", box=None, pad_edge=False)
    colours = {"finished": "dim", "taken over": "cyan", "run": "bold", "wait": ""}
    for decision, estimate in rows:
        images = "" if estimate.images is None else f"{'~' if estimate.images_guessed else ''}{estimate.images:,}"
        seconds = "" if decision.artifact else _seconds(estimate.seconds)
        size = "" if decision.artifact else _size(estimate.size_bytes)
        style = colours[decision.action]
        action = "run" if decision.action == "wait" else decision.action
        table.add_row(decision.stage.id, action, safe(decision.reason), images, seconds, size, style=style)
    show(out, table)
    if any(e.images_guessed for _, e in rows):
        note = "~: estimated from the sizes of tars and Parquet files; ingest counts their images"
        out.print(note, style="dim", soft_wrap=True)
    refused = api.refused(opened, [decision for decision, _ in rows])
    if refused is not None and not fresh:
        err.print(f"[yellow]`lodeset run` would be refused:[/] {safe(refused)}", highlight=False, soft_wrap=True)
        return
    changed = [d.stage.id for d, _ in rows if d.action == "run"]
    also = [d.stage.id for d, _ in rows if d.action == "wait"]
    if not changed:
        out.print("nothing to do")
    else:
        then = f", then those of the {len(also)} stages after it whose inputs change" if also else ""
        out.print(f"`lodeset run {safe(config)}` would run {', '.join(changed)}{then}", highlight=False, soft_wrap=True)


def _show_missing(messages: Sequence[str]) -> None:
    err.print(f"[yellow]not ready to run:[/] {len(messages)} missing:", highlight=False)
    for message in messages[:MISSING_SHOWN]:
        err.print(f"  {safe(message)}", highlight=False, soft_wrap=True)
    if len(messages) > MISSING_SHOWN:
        err.print(f"  and {len(messages) - MISSING_SHOWN} more (`--json` lists all)", highlight=False)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return (
        f"~{seconds:.0f} s"
        if seconds < 120
        else f"~{seconds / 60:.0f} min"
        if seconds < 7200
        else f"~{seconds / 3600:.1f} h"
    )


def _size(size: int | None) -> str:
    return "?" if size is None else f"~{humanize.naturalsize(size, format='%.0f')}"


@app.command()
def run(
    config: ConfigPath,
    set_: Set = None,
    until: Until = None,
    limit: Limit = None,
    fresh: Fresh = False,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="then make what `lodeset inspect` shows of the run")
    ] = False,
    logs: Annotated[
        Logs, typer.Option("--log", envvar="LODESET_LOG", help="what is told on standard error while it runs")
    ] = Logs.text,
    as_json: Json = False,
) -> None:
    """Run everything that is not finished."""
    from lodeset.infra.cli.progress import json_lines, watching

    project, breach = _project(config, set_, limit), None
    with json_lines(project.name) if logs is Logs.json else watching(err) as watch:
        try:
            done = project.run(until=until, fresh=fresh, watch=watch)
        except api.BreachedError as error:
            done, breach = project.status(), error
    if inspect:
        made_of(api.open_store(config, project.overrides, limit))
    show_status(config, done, as_json)
    if done.summary.gates is not None:
        show_gates(err, done.summary.gates, config)
    if breach is not None:
        err.print(f"[bold red]error:[/] {safe(breach)}", soft_wrap=True)
        raise typer.Exit(breach.exit_code)


@app.command()
def compact(
    config: ConfigPath,
    delete: Annotated[bool, typer.Option("--delete", help="delete the shards that the new ones replace")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Rewrite the shards without the images that no longer count."""
    from lodeset.infra.cli.progress import watching

    opened = api.open_store(config, tuple(set_ or ()))
    with watching(err) as watch:
        done = api.compact(opened, watch, delete)
    if as_json:
        print_json(vars(done))
        return
    out.print(
        f"{done.images:,} images in {done.shards} shards of {_size(done.size_bytes)[1:]}, in {done.folder}; "
        f"{'deleted' if delete else 'no longer referenced:'} {_size(done.superseded_bytes)[1:]}"
        + ("" if delete or not done.superseded_bytes else " of old shards (`--delete` deletes them)"),
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def forget(
    config: ConfigPath,
    what: Annotated[list[str], typer.Argument(metavar="IMAGE_ID or URL", help="one or more images")],
    copies: Annotated[bool, typer.Option("--copies", help="also take out near-duplicates of these images")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Take images out of every table, shard and page, and never take them in again."""
    done = api.forget(config, what, copies, tuple(set_ or ()))
    if as_json:
        print_json(vars(done))
        return
    rows = ", ".join(f"{name} {count:,}" for name, count in sorted(done.rows.items()) if count) or "none"
    shards = "1 shard was" if done.shards == 1 else f"{done.shards:,} shards were"
    out.print(f"forgotten: {', '.join(done.image_ids)}; {shards} rewritten; rows removed: {rows}", soft_wrap=True)
    if done.copies:
        near = "1 near-duplicate stays" if len(done.copies) == 1 else f"{len(done.copies):,} near-duplicates stay"
        err.print(
            f"[yellow]warning:[/] {near}, e.g. {done.copies[0]}: `lodeset forget` with `--copies` takes these out, too",
            soft_wrap=True,
        )
    for warning in done.warnings:
        err.print(f"[yellow]warning:[/] {safe(warning)}", highlight=False, soft_wrap=True)


@app.command()
def report(
    config: ConfigPath,
    to: Annotated[Path | None, typer.Option("--out", help="page to write [report.html]", show_default=False)] = None,
    number: RunNumber = None,
    compare: Annotated[
        int | None,
        typer.Option(min=1, metavar="RUN", help="show what differs from this run: funnel, settings, images"),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="print tables instead of writing a page")] = False,
    set_: Set = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: funnel, examples with pictures, curves."""
    if text:
        if as_json or to is not None:
            raise ConfigError("--text prints tables: leave out --json and --out, or leave out --text")
        opened = api.open_store(config, tuple(set_ or ()), limit)
        for line in api.report_text(opened, number, compare):
            out.print(line)
        return
    page = _project(config, set_, limit).report(to or Path("report.html"), number, compare)
    if as_json:
        print_json({"path": str(page)})
    else:
        out.print(safe(page), highlight=False, soft_wrap=True)


@app.command()
def dedup_preview(
    config: ConfigPath,
    to: Annotated[Path, typer.Option("--out", help="page to write")] = Path("dedup-preview.html"),
    pairs: Annotated[int, typer.Option(min=1, help="number of pairs in each section")] = 12,
    number: RunNumber = None,
    set_: Set = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Run up to dedup and show pairs close to the threshold between copies and different images."""
    from lodeset.infra.cli.progress import watching

    opened = api.open_store(config, tuple(set_ or ()), limit)
    with watching(err) as watch:
        done = api.dedup_preview(opened, watch, to, pairs, number)
    if as_json:
        print_json(done)
        return
    table = Table("pairs", "judged", box=None, pad_edge=False)
    for section in done["sections"]:
        table.add_row(f"{section['pairs']:,}", safe(section["title"]))
    out.print(table)
    out.print(safe(done["path"]), highlight=False, soft_wrap=True)
    if done["refused"]:
        err.print(f"[yellow]warning:[/] dedup stopped: {safe(done['refused'])}", highlight=False, soft_wrap=True)


@app.command()
def trace(
    config: ConfigPath,
    what: Annotated[
        str, typer.Argument(metavar="IMAGE", help="an image_id or its first digits, a path, a URL, or a picture file")
    ],
    number: RunNumber = None,
    set_: Set = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Show what happened to one image on its way from its source to its shard."""
    story = _project(config, set_, limit).trace(what, number)
    if as_json:
        print_json({"image_id": story.image_id, "sentence": story.sentence, "steps": list(story.steps)})
        return
    out.print(f"[bold]{story.image_id or safe(what)}[/]: {safe(story.sentence)}", highlight=False, soft_wrap=True)
    for step in story.steps:
        rest = {k: v for k, v in step.items() if k not in ("stage", "table", "image_id") and v not in (None, "")}
        out.print(f"[bold]{step['stage']}[/] {step['table']}", highlight=False)
        for key, value in rest.items():
            out.print(f"    {key}: {safe(value)}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder for the sample world")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Make a sample world with known truth and run everything on it."""
    from lodeset.infra.cli.progress import watching

    with watching(err) as watch:
        result = api.demo(folder, watch)
    if as_json:
        print_json(result)
        return
    table = Table("what", "figure", box=None, pad_edge=False, show_header=False)
    for name, figure in _flat(result):
        table.add_row(name, safe(figure))
    out.print(table)


def _flat(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(section, str(line)) for section, lines in result["lines"].items() for line in lines]


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="also test the store, disk and Ray cluster of this configuration"),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Show what works on this machine, and for a configuration, and what to do about what does not."""
    checks = api.doctor(config, tuple(set_ or ()))
    broken = [c.name for c in checks if c.needed and not c.works]
    if as_json:
        print_json({"checks": [vars(c) for c in checks], "works": not broken})
    else:
        for check in checks:
            mark = "[green]works[/]" if check.works else "[red]broken[/]" if check.needed else "[yellow]absent[/]"
            out.print(f"{mark:<24} {check.name:<14} {safe(check.told)}", highlight=False, soft_wrap=True)
    if broken:
        raise LodesetError(f"not working: {', '.join(broken)}")
