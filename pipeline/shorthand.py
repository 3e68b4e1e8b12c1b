"""What a configuration may leave out of its sets: a list around one, everything but the path, a name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Of each key that holds sets: what a bare path means beside itself. Without a name, a set is called after its path.
_MEANT: dict[str, dict[str, Any]] = {
    "curated": {"retrieve": {"mode": "sample"}},
    "reference": {},
    "targets": {},
}
_TAKEN = ("pool", "all")


def written_out(values: Any) -> Any:
    """The configuration with every set as a section in a list; what is none of this is left for validation to judge."""
    if not isinstance(values, dict):
        return values
    full = {**values}
    if "pool" in full:
        full["pool"] = _listed(full["pool"], {})
    for role, meant in _MEANT.items():
        if role in full:
            full[role] = _listed(full[role], meant)
    taken = {*_TAKEN, *(str(one["name"]) for role in _MEANT for one in _sections(full.get(role)) if "name" in one)}
    for role in _MEANT:
        for number, one in enumerate(_sections(full.get(role))):
            if "name" not in one and isinstance(one.get("uri"), str):
                one["name"] = _name(one["uri"], role, number, taken)
                taken.add(one["name"])
    return full


def short_too(schema: dict[str, Any]) -> None:
    """Lets the JSON schema of a list of sets say what `written_out` takes: one of them, or a path, without the list."""
    whole = {key: schema.pop(key) for key in list(schema) if key not in ("title", "description", "default")}
    one = {"anyOf": [whole["items"], {"type": "string"}]}
    schema["anyOf"] = [{**whole, "items": one}, *one["anyOf"]]


def _listed(value: Any, meant: Mapping[str, Any]) -> Any:
    if isinstance(value, str | Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    sections = ({"uri": one, **meant} if isinstance(one, str) else one for one in value)
    return [{**one} if isinstance(one, Mapping) else one for one in sections]


def _sections(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _name(uri: str, role: str, number: int, taken: set[str]) -> str:
    """The last folder or file of a path, with the one above it or the set's part before it where that is another's."""
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
    """What of a piece of a path may stand in a name; of `train-*.tar` that is `train`, of `*.tar` nothing."""
    globbed = re.sub(r"[*?].*|\[[^\]]*\].*|\{[^}]*\}.*", "", piece)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", globbed).strip("-._")
