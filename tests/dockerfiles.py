"""Dockerfiles as data: stages of instructions, with arguments filled in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {name: ROOT / f"docker/{name}.Dockerfile" for name in ("cpu", "gpu")}


@dataclass
class Stage:
    base: str
    arguments: dict[str, str]
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def of(self, kind: str) -> list[str]:
        return [text for name, text in self.instructions if name == kind]


def stages(file: Path) -> list[Stage]:
    """The stages of a Dockerfile; a `RUN` keeps its variables, which the shell fills in."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    before: dict[str, str] = {}
    found: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        kind, _, rest = line.partition(" ")
        known = found[-1].arguments if found else before
        if kind == "ARG":
            name, equals, value = rest.partition("=")
            known[name] = value if equals else before[name]
            continue
        if kind == "FROM":
            found.append(Stage(_filled(rest, before).partition(" AS ")[0], {}))
        else:
            found[-1].instructions.append((kind, rest if kind == "RUN" else _filled(rest, known)))
    return found


def _filled(text: str, known: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: known[match[1]], text)
