"""Each procedure of the runbook is executed as it is written, in the situation that it is for."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from builders import picture, write_tar
from commands import lodeset
from inline import in_one_process

from lodeset.pipeline.dag import attempts, claims
from lodeset.pipeline.dag.store import Store

pytestmark = pytest.mark.slow

RUNBOOK = Path(__file__).parents[2] / "docs/operations.md"
Situation = Callable[[Path], None]


def procedures() -> dict[str, list[tuple[list[str], int]]]:
    """The commands under each heading, with the exit codes that they say they have."""
    found: dict[str, list[tuple[list[str], int]]] = {}
    for section in RUNBOOK.read_text().split("\n## ")[1:]:
        lines = [
            line for block in re.findall(r"^```sh\n(.*?)^```", section, re.S | re.M) for line in block.splitlines()
        ]
        commands = []
        for line in lines:
            command, _, remark = line.partition("#")
            told = re.search(r"exit code (\d)", remark)
            words = shlex.split(command)
            assert words[0] == "lodeset", line
            commands.append((words[1:], int(told[1]) if told else 0))
        if commands:
            found[section.splitlines()[0]] = commands
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a configuration that was run once. One image of its pool is broken."""
    folder = tmp_path_factory.mktemp("runbook")
    images = [(f"{i}.png", picture(i, width=80, height=72)) for i in range(24)]
    images[3] = ("3.png", images[3][1][:200])
    (folder / "pool").mkdir()
    write_tar(folder / "pool/a.tar", images)
    (folder / "lodeset.yaml").write_text(yaml.safe_dump({"pool": ["pool/*.tar"]}))
    with in_one_process():
        lodeset("run", folder / "lodeset.yaml")
        yield folder


def grown(folder: Path) -> None:
    write_tar(folder / "pool/b.tar", [(f"{i}.png", picture(100 + i, width=80, height=72)) for i in range(6)])


def failed(folder: Path) -> None:
    """A source held no image when the last run read it, and holds some since."""
    extra = folder / "extra"
    extra.mkdir()
    (extra / "readme.txt").write_text("images follow")
    (folder / "lodeset.yaml").write_text(yaml.safe_dump({"pool": ["pool/*.tar", "extra/"]}))
    assert "extra" in lodeset("run", folder / "lodeset.yaml", code=1)[1]
    (extra / "image.png").write_bytes(picture(50, width=80, height=72))


KILLED = """
import os, sys
from lodeset.pipeline.dag.attempts import attempt
from lodeset.pipeline.dag.store import Store
with attempt(Store(sys.argv[1]), {}, print, name="lodeset"):
    os.kill(os.getpid(), 9)
"""


def killed(folder: Path) -> None:
    grown(folder)
    subprocess.run([sys.executable, "-c", KILLED, str(folder / "runs")])


def held(folder: Path) -> None:
    """By a process of a machine that was switched off half a minute after it last renewed its claim."""
    grown(folder)
    owner = {**claims.this_process(), "host": "elsewhere"}
    Store(str(folder / "runs")).put_absent("claims/run-lodeset.json", json.dumps(owner).encode())


def freed(folder: Path) -> None:
    """The lease has run out."""
    (folder / "runs/claims/run-lodeset.json").unlink()


def several_runs(folder: Path) -> None:
    grown(folder)
    lodeset("run", folder / "lodeset.yaml")


def damaged(folder: Path) -> None:
    shard = next((folder / "runs/shards").glob("*/*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def accepted(folder: Path) -> None:
    """The second run is the one that turns out to be bad."""
    several_runs(folder)


SITUATIONS: dict[str, Situation] = {
    "A stage failed": failed,
    "A run was killed": killed,
    "Input that cannot be read": lambda folder: None,
    "A claim that is stuck": held,
    "The store is full": several_runs,
    "Damage": damaged,
    "An upgrade": grown,
    "A lost head": killed,
    "A bad run has to go back": accepted,
}
BETWEEN: dict[tuple[str, int], Situation] = {("A claim that is stuck", 2): freed}  # before the command of this number


def test_every_procedure_has_a_situation() -> None:
    assert set(procedures()) == set(SITUATIONS)


@pytest.mark.parametrize("heading", SITUATIONS)
def test_a_procedure_works_as_it_is_written(
    heading: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    monkeypatch.chdir(folder)
    SITUATIONS[heading](folder)
    for number, (words, code) in enumerate(procedures()[heading]):
        BETWEEN.get((heading, number), lambda folder: None)(folder)
        out, _ = lodeset(*words, code=code)
        if words[0] == "status" and code == 0 and "--check" in words:
            assert out.startswith("done")
    assert lodeset("verify", "lodeset.yaml", "--deep")
    assert attempts.numbers(Store(str(folder / "runs")))
