"""Abbreviations of sets in a configuration: a set instead of a list, only the path, no name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# For each key that holds sets: what a bare path means in addition. A set without a name is named after its path.
_MEANT: dict[str, dict[str, Any]] = {
    "curated": {"retrieve": {"mode": "sample"}},
    "reference": {},
    "targets": {},
}
_TAKEN = ("pool", "all")


def written_out(values: Any) -> Any:
    """The configuration with every set as a section in a list; anything else is left for validation to judge."""
    if not isinstance(values, dict):
        return values
    full = {**values}
    if "pool" in full:
        full["pool"] = _listed(full["pool"], {})
    for role, meant in _MEANT.items():
        if role in full:
            full[role] = _listed(full[role], meant)
    taken = {
        *_TAKEN,
        *(str(section["name"]) for role in _MEANT for section in _sections(full.get(role)) if "name" in section),
    }
    for role in _MEANT:
        for number, section in enumerate(_sections(full.get(role))):
            if "name" not in section and isinstance(section.get("uri"), str):
                section["name"] = _name(section["uri"], role, number, taken)
                taken.add(section["name"])
    return full


def short_too(schema: dict[str, Any]) -> None:
    """Extend the JSON schema of a list of sets by what `written_out` accepts: a single set, or a path, without the
    list.
    """
    whole = {key: schema.pop(key) for key in list(schema) if key not in ("title", "description", "default")}
    entry = {"anyOf": [whole["items"], {"type": "string"}]}
    schema["anyOf"] = [{**whole, "items": entry}, *entry["anyOf"]]


def _listed(value: Any, meant: Mapping[str, Any]) -> Any:
    if isinstance(value, str | Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    sections = ({"uri": entry, **meant} if isinstance(entry, str) else entry for entry in value)
    return [{**section} if isinstance(section, Mapping) else section for section in sections]


def _sections(value: Any) -> list[dict[str, Any]]:
    return [section for section in value if isinstance(section, dict)] if isinstance(value, list) else []


def _name(uri: str, role: str, number: int, taken: set[str]) -> str:
    """The last folder or file of a path, preceded by its parent or by the set's role and number if that name is used
    already.
    """
    pieces = [_plain(piece) for piece in re.sub(r"[?#].*", "", uri.partition("://")[2] or uri).split("/")]
    pieces = [piece for piece in pieces if piece]
    last = (
        re.sub(r"\.(tar|parquet|tgz|tzst|zip|csv|jsonl|ndjson)(\.\w+)?$", "", pieces[-1], flags=re.IGNORECASE).strip(
            "-._"
        )
        if pieces
        else ""
    )
    candidates = [last, f"{pieces[-2]}-{last}"] if len(pieces) > 1 else [last]
    for name in (*candidates, f"{role}-{last}", f"{role}-{number}"):
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) and name not in taken:
            return name
    return f"{role}-{len(taken)}"


def _plain(piece: str) -> str:
    """The part of a path component that may be used in a name: `train` for `train-*.tar`, nothing for `*.tar`."""
    globbed = re.sub(r"[*?].*|\[[^\]]*\].*|\{[^}]*\}.*", "", piece)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", globbed).strip("-._")
