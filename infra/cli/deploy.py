"""The commands that prepare runs elsewhere and at other times: files for clusters, and schedules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lodeset.infra.cli.options import Json, Set, err, out, print_json, safe
from lodeset.infra.deploy.config import Schedule
from lodeset.infra.deploy.written import Document, as_yaml, joined
from lodeset.infra.schedule.schedule import Kind
from lodeset.pipeline.errors import ConfigError, LodesetError

deploy = typer.Typer()
render = typer.Typer(no_args_is_help=True, help="Write files for clusters.")
deploy.add_typer(render, name="render")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="configuration file (`lodeset init` writes one)")]
Cron = Annotated[
    str | None, typer.Option(help='times as in a crontab, e.g. "0 3 * * 1" [default: deploy.schedule.cron]')
]
Zone = Annotated[str | None, typer.Option(help="time zone of the times [default: deploy.schedule.timezone]")]


@render.command()
def kubernetes(
    config: ConfigPath,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="write one file an object into this folder")
    ] = None,
    cron: Cron = None,
    timezone: Zone = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Print the objects that run a configuration in Kubernetes: a Ray cluster or Ray jobs, and their CronJob."""
    from lodeset.infra.deploy.kubernetes import render_kubernetes

    if timezone is not None and cron is None:
        raise ConfigError("--timezone needs --cron")
    when = Schedule(cron=cron, timezone=timezone) if cron is not None else None
    made = render_kubernetes(config, tuple(set_ or ()), when)
    _give(made, to, as_json)


@render.command()
def cluster(
    config: ConfigPath,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="write `cluster.yaml` into this folder")
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Print the configuration with which `ray up` starts a cluster of machines."""
    from lodeset.infra.deploy.launcher import render_cluster

    _give((render_cluster(config, tuple(set_ or ())),), to, as_json)


def _give(made: Sequence[Document], to: Path | None, as_json: bool) -> None:
    if to is None:
        if as_json:
            print_json({"objects": [document.body for document in made]})
        else:
            print(joined(made), end="")
        return
    numbered = len(made) > 1  # `kubectl apply -f DIR` goes by the names
    files = {f"{n}-{d.name}.yaml" if numbered else f"{d.name}.yaml": d for n, d in enumerate(made, 1)}
    try:
        to.mkdir(parents=True, exist_ok=True)
        others = sorted(file.name for file in to.glob("*.yaml") if numbered and file.name not in files)
        for name, document in files.items():
            (to / name).write_text(as_yaml(document.body, document.comment), encoding="utf-8")
    except OSError as error:
        raise LodesetError(f"cannot write to {to}: {error.strerror}") from None
    if as_json:
        print_json({"files": [str(to / name) for name in files], "others": [str(to / name) for name in others]})
        return
    for name in files:
        out.print(f"wrote {safe(to / name)}", soft_wrap=True)
    if others:
        err.print(
            f"[yellow]warning:[/] {safe(to)} also holds {safe(', '.join(others))}, which is none of these",
            soft_wrap=True,
        )


@deploy.command()
def schedule(
    config: ConfigPath,
    cron: Cron = None,
    kind: Annotated[
        Kind, typer.Option("--as", help="a line of a crontab, a timer of systemd's user manager, or a CronJob")
    ] = "cron",
    timezone: Zone = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="submit the runs to this Ray cluster instead of running them here")
    ] = None,
    install: Annotated[bool, typer.Option("--install", help="install it for this user; again: replace it")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="take out what --install put in")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Print or install what runs a configuration at fixed times. A run that finds another at work is skipped."""
    from lodeset.infra.schedule import schedule as schedules

    if remove:
        if install or cron:
            raise ConfigError("--remove takes neither --install nor --cron")
        removed = schedules.unschedule(config, kind)
        if as_json:
            print_json({"as": kind, "removed": removed})
        else:
            out.print(
                f"removed the schedule of {safe(config)}" if removed else f"no schedule of {safe(config)}",
                soft_wrap=True,
            )
        return
    done = schedules.schedule(
        config,
        tuple(set_ or ()),
        kind=kind,
        cron=cron,
        timezone=timezone,
        address=address,
        install=install,
    )
    if as_json:
        print_json(
            {
                "as": done.kind,
                "cron": done.cron,
                "timezone": done.timezone,
                "next": [time.isoformat() for time in done.next],
                "files": dict(done.files),
                "installed": install,
                "changed": bool(done.changed),
            }
        )
        return
    comes = ", ".join(f"{time:%a %Y-%m-%d %H:%M %Z}" for time in done.next)
    if install:
        out.print(
            f"{'installed' if done.changed else 'already installed'}: {safe(', '.join(done.files))}", soft_wrap=True
        )
        out.print(f"next ({safe(done.timezone)}): {comes}", soft_wrap=True)
        return
    # A comment in all three languages, so that the output can be used as it is.
    print(f"# next ({done.timezone}): {comes}")
    for name, text in done.files.items():
        if len(done.files) > 1:
            print(f"\n# {name}")
        print(text, end="")
