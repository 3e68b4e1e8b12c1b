"""Schedules as timers of systemd's user manager."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lodeset.infra.schedule.cron import Cron, on_calendar
from lodeset.infra.schedule.entry import HELD, Entry
from lodeset.pipeline.errors import LodesetError

SECONDS = 60.0
STOP_S = 120  # a run that is stopped commits the parts at hand first


def units(entry: Entry, cron: Cron, zone: str | None) -> dict[str, str]:
    """File name -> text of the service and its timer."""
    calendars = "\n".join(f"OnCalendar={line}" for line in on_calendar(cron, zone))
    told = str(entry.config).replace("%", "%%")
    service = f"""\
[Unit]
Description=lodeset run of {told} at fixed times

[Service]
Type=oneshot
ExecStart={" ".join(_quoted(word) for word in entry.command)}
# Another run is at work: this one is skipped.
SuccessExitStatus={HELD}
# The run ends its own processes; what is left after the timeout is killed.
KillMode=mixed
TimeoutStopSec={STOP_S}
"""
    timer = f"""\
[Unit]
Description=Times of the lodeset run of {told} (timer)

[Timer]
{calendars}
# A time that passed while the machine was off is made up for once.
Persistent=true

[Install]
WantedBy=timers.target
"""
    return {f"{entry.unit}.service": service, f"{entry.unit}.timer": timer}


def _quoted(word: str) -> str:
    for special, written in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(special, written)
    return f'"{word}"'


def folder() -> Path:
    """Where the user's units lie."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "systemd" / "user"


def installed(entry: Entry, files: Mapping[str, str]) -> bool:
    """Write the units and start the timer; without files, stop it and delete them.

    Returns:
        whether a file was changed.

    Raises:
        LodesetError: the files cannot be written, or systemd refuses them.
    """
    where = folder()
    timer, names = f"{entry.unit}.timer", (f"{entry.unit}.service", f"{entry.unit}.timer")
    before = {name: _text(where / name) for name in names}
    if not files:
        if not any(before.values()):
            return False
        if before[timer] is not None:
            _systemctl("disable", "--now", timer)
        for name in names:
            (where / name).unlink(missing_ok=True)
        _systemctl("daemon-reload")
        return True
    where.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (where / name).write_text(text, encoding="utf-8")
    _systemctl("daemon-reload")
    _systemctl("enable", timer)
    _systemctl("restart", timer)  # a timer that runs keeps its old times
    return before != files


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _systemctl(*arguments: str) -> None:
    command = ["systemctl", "--user", *arguments]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        raise LodesetError("there is no `systemctl` on this machine: use `--as cron`") from None
    except subprocess.TimeoutExpired:
        raise LodesetError(f"`{' '.join(command)}` did not answer within {SECONDS:.0f} s") from None
    if done.returncode != 0:
        raise LodesetError(f"`{' '.join(command)}` failed: {done.stderr.strip() or 'it gave no reason'}")
