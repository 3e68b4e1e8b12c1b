"""The worked examples of docs/extending.md, applied to a copy of the package and run from there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "extending.md"
PACKAGES = ("lodeset", "pipeline", "training", "pruning", "infra")  # `lodeset` holds links to the others
_FENCED = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Change:
    """What a diff does to one file; `before` is "" for a new file."""

    path: str
    before: str
    added: tuple[str, ...]
    removed: tuple[str, ...]


def diff_of(heading: str) -> str:
    """All diffs of the page's part `## heading`, one after the other."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert heading in found, f"{PAGE.name} has no part `## {heading}`; it has: {', '.join(found)}"
    diffs = _FENCED.findall(found[heading])
    assert diffs, f"the part `{heading}` of {PAGE.name} shows no ```diff"
    return "".join(diffs)


def changes_of(diff: str) -> list[Change]:
    """What a diff changes, file by file."""
    changes = []
    for of_file in re.split(r"^(?=--- )", diff, flags=re.MULTILINE)[1:]:
        before, after, *lines = of_file.splitlines()
        assert after.startswith("+++ b/"), f"not the name of a changed file: {after}"
        changes.append(
            Change(
                path=after.removeprefix("+++ b/"),
                before="" if before == "--- /dev/null" else before.removeprefix("--- a/"),
                added=tuple(line[1:] for line in lines if line.startswith("+")),
                removed=tuple(line[1:] for line in lines if line.startswith("-")),
            )
        )
    return changes


def extended(heading: str, folder: Path) -> Path:
    """A copy of the package in `folder`, with the worked example of a part of the page applied to it.

    The example must be what the page promises: one new file, and one added line where it is listed.
    """
    diff = diff_of(heading)
    new, listed = sorted(changes_of(diff), key=lambda change: bool(change.before))
    assert new.before == "" and not new.removed, f"{new.path} is not a new file"
    assert listed.path == listed.before, f"{listed.path} is not a file that is there already"
    assert len(listed.added) == 1 and not listed.removed, f"{listed.path} is changed in more than one added line"
    copy = folder / "copy"
    for name in PACKAGES:
        shutil.copytree(
            REPOSITORY / name, copy / name, symlinks=True
        )  # with what Python compiled: that is the slow part
    # The ceiling keeps git from taking the copy for a part of a repository around it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder)}
    command = ["git", "apply", "--recount", "-"]
    applied = subprocess.run(command, cwd=copy, env=environment, input=diff, text=True, capture_output=True)
    assert applied.returncode == 0, f"the diff of `{heading}` does not apply: {applied.stderr}"
    return copy


def run(copy: Path, code: str, *arguments: str) -> str:
    """What a fresh interpreter prints that runs `code` with the copy of the package first on its import path."""
    # Libraries leave threads that can abort a process at its exit, as in stages' own processes.
    ending = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code + ending, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy.parent, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, f"the extended package failed:\n{done.stderr}"
    return done.stdout
