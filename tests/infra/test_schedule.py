"""Schedules: which times are accepted, that all schedulers get the same ones, and what is installed."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from commands import lodeset

from lodeset.infra.schedule import crontab
from lodeset.infra.schedule.cron import agree, for_kubernetes, next_times, on_calendar, parsed, system_zone
from lodeset.infra.schedule.entry import entry
from lodeset.infra.schedule.schedule import schedule, unschedule
from lodeset.pipeline.errors import ConfigError, LodesetError

BERLIN = "Europe/Berlin"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file whose path needs quoting everywhere."""
    folder = tmp_path / 'it\'s 100% $HOME \\ "mine"'
    folder.mkdir()
    path = folder / "my pool.yaml"
    path.write_text("pool: [images/]\n")
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("3", "expected five fields"),
        ("0 0 3 * * 1", "expected five fields"),
        ("@reboot", "expected five fields"),
        ("0 24 * * *", "the hour is out of range"),
        ("0 0 31 2 *", "there is no such day"),
        ("0 0 * * 8", "the day-of-week is out of range"),
        ("0 0 * FOO *", "the month is out of range"),
        ("5-1 0 * * *", "the minute is out of range"),
        ("*/0 0 * * *", "the minute is out of range"),
        ("0 0 L * *", "the day of the month `L` is not a list of numbers"),
        ("0 0 * * MON#2", "other extensions of cron"),
        ("0 0 ? * 1", "the day of the month `?`"),
        ("5/10 * * * *", "has a step but no range"),
        ("0 0 */2 * 1", "cron reads `*/2` beside `1` as days that match both, Kubernetes as days that match either"),
        ("0 0 1 * */2", "list the days"),
    ],
)
def test_times_that_schedulers_refuse_or_read_differently(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(text)
    assert told in str(error.value) and f'cron "{text}"' in str(error.value)


def test_kubernetes_knows_sunday_as_0_only() -> None:
    assert for_kubernetes(parsed("0 3 * * 5-7")) == "0 3 * * 0,5,6"
    assert for_kubernetes(parsed("0 3 * * 0-7")) == "0 3 * * *"
    assert for_kubernetes(parsed("@weekly")) == "0 0 * * 0"
    assert for_kubernetes(parsed("*/15 8-18 * JAN MON-FRI")) == "*/15 8-18 * JAN MON-FRI"


def drawn(rng: random.Random) -> str:
    """A random expression of five fields."""

    def field(low: int, high: int) -> str:
        start = rng.randint(low, high)
        kinds = ["*", "*", str(start), f"{start}-{rng.randint(start, high)}", f"{start},{rng.randint(low, high)}"]
        return rng.choice([*kinds, f"{low}-{high}/{rng.randint(1, 9)}"])

    return " ".join(field(*bounds) for bounds in ((0, 59), (0, 23), (1, 28), (1, 12), (0, 7)))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_gets_the_times_of_cron() -> None:
    """The independent reference is systemd's own reading of what `on_calendar` writes; clocks do not change in between."""
    rng, compared = random.Random(5), 0
    start = datetime(2026, 11, 30, 10, 7, tzinfo=ZoneInfo("UTC"))
    for _ in range(25):
        cron = parsed(drawn(rng))
        expected = next_times(cron, ZoneInfo(BERLIN), 4, start)
        theirs: set[datetime] = set()
        for line in on_calendar(cron, BERLIN):
            command = ["systemd-analyze", "calendar", "--iterations=4", f"--base-time={start:%Y-%m-%d %H:%M:%S UTC}"]
            done = subprocess.run([*command, line], capture_output=True, text=True, env={**os.environ, "TZ": "UTC"})
            assert done.returncode == 0, done.stderr
            for told in done.stdout.splitlines():
                when = told.partition(": ")[2].split()
                if ("elapse" in told or "Iter." in told) and when[-1:] == ["UTC"]:
                    at = datetime.strptime(" ".join(when[1:3]), "%Y-%m-%d %H:%M:%S")
                    theirs.add(at.replace(tzinfo=ZoneInfo("UTC")))
        first = sorted(theirs)[:4]
        if expected[-1] < datetime(2027, 3, 27, tzinfo=ZoneInfo("UTC")):
            assert first == [time.astimezone(ZoneInfo("UTC")) for time in expected], cron
            compared += 1
    assert compared >= 10


def executed_by_cron(line: str, status: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of a crontab as cron runs it, with a Python that tells its arguments and ends with `status`."""
    command = line.split(maxsplit=5)[5].replace("\\%", "%")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\nexit {status}\n')
    python.chmod(0o755)
    real = command.removeprefix("told=$(").split(" -P ")[0]
    return subprocess.run(
        ["/bin/sh", "-c", command.replace(real, str(python), 1)], capture_output=True, text=True, cwd="/"
    )


def test_a_line_for_cron_speaks_only_of_failures(config: Path, tmp_path: Path) -> None:
    what = entry(config, overrides=("dedup.k=3 4",))
    begin, line, end = crontab.block(what, parsed("0 3 * * 1")).splitlines()
    assert begin.startswith("# >>>") and end.startswith("# <<<") and line.startswith("0 3 * * 1 ")
    assert "%" not in line.replace("\\%", "")
    for status, code in ((0, 0), (4, 0)):
        done = executed_by_cron(line, status, tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    failed = executed_by_cron(line, 1, tmp_path)
    words = ["-P", "-m", "lodeset", "run", str(config), "--set", "dedup.k=3 4"]
    assert failed.returncode == 1 and failed.stdout.splitlines() == [f"<{word}>" for word in words]


FAKE_CRONTAB = """#!/bin/sh
file="$FAKE_CRONTAB"
case "$1" in
-l) if [ -e "$file.broken" ]; then echo "crontab: cannot read" >&2; exit 1; fi
    if [ -e "$file" ]; then cat "$file"; else echo "no crontab for me" >&2; exit 1; fi ;;
-) cat > "$file"; echo x >> "$file.writes" ;;
esac
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that holds the crontab of a fake `crontab`; `<file>.writes` has a line for each time it was written."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/crontab").write_text(FAKE_CRONTAB)
    (tmp_path / "bin/crontab").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_CRONTAB", str(tmp_path / "table"))
    return tmp_path / "table"


def test_a_crontab_keeps_everything_else(config: Path, table: Path) -> None:
    theirs = "MAILTO=me\n# mine\n5 5 * * * backup 100\\%"  # the last line has no end
    table.write_text(theirs)
    assert schedule(config, cron="0 3 * * 1", install=True).changed is True
    assert schedule(config, cron="0 3 * * 1", install=True).changed is False
    assert table.with_suffix(".writes").read_text() == "x\n"
    assert table.read_text().startswith(theirs + "\n") and table.read_text().count("-m lodeset run") == 1

    other = config.with_name("other.yaml")
    other.write_text("pool: [images/]\n")
    assert schedule(other, cron="@daily", install=True).changed
    assert schedule(config, cron="0 4 * * 2", install=True).changed
    assert table.read_text().count("-m lodeset run") == 2 and "0 3 * * 1" not in table.read_text()

    config.unlink()
    assert unschedule(config, "cron") and not unschedule(config, "cron")
    assert unschedule(other, "cron") and table.read_text() == theirs + "\n"


def test_a_crontab_that_cannot_be_read_is_not_written(config: Path, table: Path) -> None:
    table.write_text("5 5 * * * backup\n")
    table.with_name("table.broken").touch()
    with pytest.raises(LodesetError, match="`crontab -l` failed: crontab: cannot read"):
        schedule(config, cron="@daily", install=True)
    table.with_name("table.broken").unlink()
    table.write_text(f"# >>> lodeset {config}\n5 5 * * * backup\n")
    with pytest.raises(LodesetError, match="mend it with `crontab -e` first"):
        schedule(config, cron="@daily", install=True)
    assert not table.with_suffix(".writes").exists()


def test_cron_goes_by_the_clock_of_the_machine(config: Path, table: Path) -> None:
    here = system_zone()
    elsewhere = "Asia/Kathmandu" if here != "Asia/Kathmandu" else "UTC"
    with pytest.raises(ConfigError, match=f"time zone {elsewhere}: cron goes by the clock of this machine"):
        schedule(config, cron="@daily", timezone=elsewhere)
    assert schedule(config, cron="@daily", timezone=here).timezone == here
    assert agree(ZoneInfo("UTC"), ZoneInfo("Etc/UTC")) and not agree(ZoneInfo("Europe/London"), ZoneInfo("UTC"))
    with pytest.raises(ConfigError, match="did you mean Europe/Berlin"):
        schedule(config, cron="@daily", timezone="Europe/Berln")


def test_a_line_that_cron_would_refuse(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cron takes at most 998: use `--as systemd`"):
        schedule(config, tuple(f"cluster.seed={n}" for n in range(60)), cron="@daily")
    broken = tmp_path / "a\nb.yaml"
    broken.write_text("pool: [images/]\n")
    with pytest.raises(ConfigError, match="cannot hold control characters"):
        schedule(broken, cron="@daily")
    with pytest.raises(ConfigError, match="this holds a credential") as error:
        schedule(config, ("store=s3://key:topsecret@bucket/runs",), cron="@daily")
    assert "topsecret" not in str(error.value)


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's units; a fake `systemctl` notes what it is asked for in `calls`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/systemctl").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tmp_path / "bin/systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config/systemd/user"


def test_a_timer_of_systemd(config: Path, units: Path, tmp_path: Path) -> None:
    done = schedule(config, kind="systemd", cron="0 3 1 * 1", timezone=BERLIN, install=True)
    assert done.changed and sorted(done.files) == sorted(file.name for file in units.iterdir())
    service, timer = sorted(done.files)
    assert f"OnCalendar=*-*-01 03:00:00 {BERLIN}\nOnCalendar=Mon *-*-* 03:00:00 {BERLIN}\n" in done.files[timer]
    assert "Persistent=true" in done.files[timer] and "SuccessExitStatus=4" in done.files[service]
    calls = [f"--user {call} {timer}" for call in ("enable", "restart")]
    assert (tmp_path / "calls").read_text().splitlines() == ["--user daemon-reload", *calls]
    assert schedule(config, kind="systemd", cron="0 3 1 * 1", timezone=BERLIN, install=True).changed is False
    config.unlink()
    assert unschedule(config, "systemd") and not unschedule(config, "systemd") and not list(units.iterdir())
    assert (tmp_path / "calls").read_text().splitlines()[-2:] == [
        f"--user disable --now {timer}",
        "--user daemon-reload",
    ]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_units(config: Path, tmp_path: Path) -> None:
    done = schedule(config, kind="systemd", cron="*/20 3 * * 1-5")
    for name, text in done.files.items():
        (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "--user", "verify", *(str(tmp_path / name) for name in done.files)]
    checked = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    )
    assert checked.returncode == 0 and "Unknown" not in checked.stderr and "Failed" not in checked.stderr, (
        checked.stderr
    )


def test_the_command_tells_times_and_text(config: Path, table: Path) -> None:
    told = json.loads(lodeset("schedule", config, "--cron", "0 3 * * 1", "--json")[0])
    assert told["as"] == "cron" and told["timezone"] == system_zone() and not told["installed"]
    assert len(told["next"]) == 3 and all(datetime.fromisoformat(time).weekday() == 0 for time in told["next"])
    printed, _ = lodeset("schedule", config, "--cron", "0 3 * * 1")
    assert printed.splitlines()[1:] == told["files"]["crontab"].splitlines()
    assert "installed: crontab" in lodeset("schedule", config, "--cron", "0 3 * * 1", "--install")[0]
    assert told["files"]["crontab"] == table.read_text()
    assert json.loads(lodeset("schedule", config, "--remove", "--json")[0]) == {"as": "cron", "removed": True}
    submits, _ = lodeset("schedule", config, "--cron", "@daily", "--address", "http://head:8265")
    assert "lodeset submit " in submits and "--address http://head:8265" in submits
    for wrong in (["--cron", "@daily", "--address", "head"], ["--as", "anacron"], [], ["--remove", "--install"]):
        lodeset("schedule", config, *wrong, code=2)


def test_the_guide_does_what_it_says(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lodeset command of the guide, as written and in its order, with the sections of the guide as configuration."""
    text = (Path(__file__).parents[2] / "docs/guides/deploy.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    tree: dict[str, Any] = {"deploy": {}}
    for section in (yaml.safe_load(block) for language, block in blocks if language == "yaml"):
        tree["deploy"].update(section.pop("deploy"))
        tree.update(section)
    tree["deploy"]["schedule"]["timezone"] = system_zone()  # cron knows no other
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lodeset.yaml").write_text(yaml.safe_dump(tree))
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("lodeset ")]
    assert len(commands) >= 5
    for words in commands:
        lodeset(*words)
    assert table.read_text() == "" and table.with_suffix(".writes").read_text() == "x\nx\n"  # installed, and removed
    assert len(list((tmp_path / "manifests").iterdir())) == 3 and (tmp_path / "cluster.yaml").exists()
