"""Schedules as lines of the user's crontab."""

from __future__ import annotations

import os
import shlex
import subprocess

from lodeset.infra.schedule.cron import Cron
from lodeset.infra.schedule.entry import HELD, Entry
from lodeset.pipeline.errors import ConfigError, LodesetError

# cron refuses longer commands (MAX_COMMAND of Vixie cron and its descendants).
LONGEST = 998
SECONDS = 30.0


def block(entry: Entry, cron: Cron) -> str:
    """The lines for a crontab, between markers of their own.

    cron mails whatever a command prints. So a run's messages are held back, and printed if it failed.

    Raises:
        ConfigError: the command is longer than cron accepts.
    """
    run = shlex.join(entry.command)
    command = f'told=$({run} 2>&1) || {{ code=$?; [ $code -eq {HELD} ] || {{ printf "%s\\n" "$told"; exit $code; }}; }}'
    line = command.replace("%", "\\%")  # cron makes a line break of a bare one, even inside quotes
    if len(line) > LONGEST:
        raise ConfigError(
            f"the command has {len(line)} characters, and cron takes at most {LONGEST}: use `--as systemd`, or put the "
            "overrides into the configuration"
        )
    begin, end = _markers(entry)
    return f"{begin}\n{cron.text} {line}\n{end}\n"


def _markers(entry: Entry) -> tuple[str, str]:
    return f"# >>> lodeset {entry.config}", f"# <<< lodeset {entry.config}"


def installed(entry: Entry, lines: str) -> bool:
    """Put the lines into the user's crontab in place of earlier ones; `""` takes them out. Everything else stays.

    Returns:
        whether the crontab was changed.

    Raises:
        LodesetError: the crontab cannot be read or written.
    """
    before = _read()
    kept = _without(before, entry)
    if lines and kept and not kept.endswith("\n"):
        kept += "\n"
    after = kept + lines
    if after == before:
        return False
    _crontab("-", text=after)
    return True


def _without(text: str, entry: Entry) -> str:
    begin, end = _markers(entry)
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if line.rstrip("\n") == begin and not inside:
            inside = True
        elif line.rstrip("\n") == end and inside:
            inside = False
        elif not inside:
            kept.append(line)
    if inside:
        raise LodesetError(f"the crontab has `{begin}` but no `{end}` after it: mend it with `crontab -e` first")
    return "".join(kept)


def _read() -> str:
    done = _run("-l")
    if done.returncode == 0:
        return done.stdout
    if "no crontab for" in done.stderr.lower():
        return ""
    raise _failed("-l", done.stderr)


def _crontab(*arguments: str, text: str) -> None:
    done = _run(*arguments, text=text)
    if done.returncode != 0:
        raise _failed(" ".join(arguments), done.stderr)


def _run(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["crontab", *arguments],
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise LodesetError("there is no `crontab` on this machine: install cron, or use `--as systemd`") from None
    except subprocess.TimeoutExpired:
        raise LodesetError(f"`crontab {' '.join(arguments)}` did not answer within {SECONDS:.0f} s") from None


def _failed(arguments: str, why: str) -> LodesetError:
    return LodesetError(f"`crontab {arguments}` failed: {why.strip() or 'it gave no reason'}")
