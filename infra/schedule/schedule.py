"""Runs at fixed times: what to install where, and when it comes next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from lodeset.infra.config import read
from lodeset.infra.deploy.config import Schedule
from lodeset.infra.schedule import crontab, systemd
from lodeset.infra.schedule.cron import agree, next_times, parsed, system_zone, zone_named
from lodeset.infra.schedule.entry import entry
from lodeset.pipeline.errors import ConfigError

Kind = Literal["cron", "systemd", "kubernetes"]


@dataclass(frozen=True)
class Scheduled:
    """A schedule: the files that make it, and its next times."""

    kind: Kind
    cron: str
    timezone: str
    next: tuple[datetime, ...]
    files: Mapping[str, str]  # name -> text; of a crontab: the lines for it
    changed: bool | None = None  # whether installing changed something; None: not installed


def schedule(
    path: Path,
    overrides: tuple[str, ...] = (),
    *,
    kind: Kind = "cron",
    cron: str | None = None,
    timezone: str | None = None,
    address: str | None = None,
    install: bool = False,
) -> Scheduled:
    """Make a schedule that runs a configuration, and install it for this user if asked to.

    Args:
        cron: instead of `deploy.schedule.cron` of the configuration.
        timezone: instead of `deploy.schedule.timezone`.
        address: submit runs to the Ray cluster at this URL instead of running them on this machine.

    Raises:
        ConfigError: the configuration or the times are wrong, or this kind of schedule cannot do what is asked.
        LodesetError: it could not be installed.
    """
    config = read(path, overrides)
    configured = config.deploy.schedule if config.deploy is not None else None
    text = cron or (configured.cron if configured is not None else None)
    if text is None:
        raise ConfigError(f'no times: give --cron, e.g. --cron "0 3 * * 1", or set deploy.schedule.cron in {path}')
    times, zone = parsed(text), timezone or (configured.timezone if configured is not None else None)
    here = system_zone() if kind != "kubernetes" else "Etc/UTC"
    shown = zone_named(zone or here)
    if address is not None and not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: expected the URL of the cluster's dashboard, e.g. http://head:8265")
    if kind == "kubernetes":
        if install:
            raise ConfigError(
                "--install: not for Kubernetes: write the objects to a file, then `kubectl apply -f FILE`"
            )
        if address is not None:
            raise ConfigError("--address: the CronJob submits to the cluster of `deploy.kubernetes`")
        from lodeset.infra.deploy.kubernetes import render_kubernetes
        from lodeset.infra.deploy.written import joined

        made = render_kubernetes(path, overrides, Schedule(cron=text, timezone=zone))
        return Scheduled(kind, times.text, shown.key, next_times(times, shown), {"kubernetes.yaml": joined(made)})
    what = entry(path, address=address, overrides=overrides)
    if kind == "cron":
        if not agree(shown, zone_named(here)):
            raise ConfigError(
                f"time zone {shown.key}: cron goes by the clock of this machine ({here}): use `--as systemd`, or give "
                f"the times in {here}"
            )
        files = {"crontab": crontab.block(what, times)}
        changed = crontab.installed(what, files["crontab"]) if install else None
    else:
        files = systemd.units(what, times, zone)
        changed = systemd.installed(what, files) if install else None
    return Scheduled(kind, times.text, shown.key, next_times(times, shown), files, changed)


def unschedule(path: Path, kind: Kind) -> bool:
    """Take out what `schedule` installed for a configuration file, which need not exist any more.

    Returns:
        whether there was something.

    Raises:
        ConfigError: nothing is installed by this kind of schedule.
        LodesetError: it could not be removed.
    """
    if kind == "kubernetes":
        raise ConfigError("--remove: not for Kubernetes: `kubectl delete -f FILE` with the file that was applied")
    what = entry(path)
    return crontab.installed(what, "") if kind == "cron" else systemd.installed(what, {})
