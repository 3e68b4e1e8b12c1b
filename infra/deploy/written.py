"""Objects as YAML text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Document:
    """One object of a file, and what is said above it."""

    name: str  # of its file, without the ending
    body: Mapping[str, Any]
    comment: str = ""


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def as_yaml(body: Any, comment: str = "") -> str:
    """One YAML document, under its comment."""
    above = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    return above + yaml.dump(body, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def joined(documents: Iterable[Document]) -> str:
    """All documents in one file."""
    return "---\n".join(as_yaml(document.body, document.comment) for document in documents)
