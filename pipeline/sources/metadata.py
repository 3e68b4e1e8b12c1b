"""What a source says about an image: label, caption, URL, licence, and the rest as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Of one sidecar, or of the texts of a Parquet row together.
MAX_BYTES = 2**20
# Python's own recursion ends at about 1,000 calls, those of Beam included.
MAX_DEPTH = 64

_NAMES = {
    "label": ("label", "cls", "class", "class_name"),
    "caption": ("caption", "text", "txt", "alt"),
    "url": ("url", "source_url", "image_url"),
    "licence": ("licence", "license"),
}
# Where a photograph was taken is nobody's business downstream.
_PLACE = re.compile(r"^(gps.*|exif.*|lat|latitude|lon|lng|longitude|geo.*|location|altitude)$", re.IGNORECASE)


@dataclass(frozen=True)
class Metadata:
    label: str | None = None
    caption: str | None = None
    url: str | None = None
    licence: str | None = None
    extra: str | None = None

    @property
    def empty(self) -> bool:
        return self == Metadata()

    @property
    def length(self) -> int:
        """Characters of all fields."""
        return sum(len(text) for text in (self.label, self.caption, self.url, self.licence, self.extra) if text)


class BadMetadata(Exception):
    """This sidecar says nothing that can be read."""


def from_fields(fields: Mapping[str, Any]) -> Metadata:
    """Plain fields (see `plain`): known names become columns, the others `extra`."""
    left = {name: value for name, value in fields.items() if value is not None and not _PLACE.match(name)}
    known: dict[str, str] = {}
    for column, names in _NAMES.items():
        for name in names:
            if name in left and isinstance(left[name], str | int | float | bool):
                known[column] = str(left.pop(name))
                break
    extra = json.dumps(left, sort_keys=True, ensure_ascii=False) if left else None
    return Metadata(**known, extra=extra)


def fields_of(extension: str, data: bytes) -> dict[str, Any]:
    """The plain fields of one `.json`, `.txt` or `.cls` member.

    Raises:
        BadMetadata: says why.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadMetadata("not UTF-8") from None
    if extension != ".json":
        return {"caption" if extension == ".txt" else "label": text.strip()}
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadMetadata(str(error)) from None
    if not isinstance(tree, dict):
        raise BadMetadata(f"holds a {type(tree).__name__}, not an object")
    fields: dict[str, Any] = plain(tree)
    return fields


def plain(value: Any, depth: int = 0) -> Any:
    """The value as JSON and Arrow can hold it: valid UTF-8, finite, no deeper than `MAX_DEPTH`; location tags are dropped.

    Raises:
        BadMetadata: it is deeper.
    """
    if depth > MAX_DEPTH:
        raise BadMetadata(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {_valid(str(k)): plain(v, depth + 1) for k, v in value.items() if not _PLACE.match(str(k))}
    if isinstance(value, list | tuple):
        return [plain(v, depth + 1) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, int | float):
        return value
    return _valid(value) if isinstance(value, str) else _valid(str(value)[:1000])


def _valid(text: str) -> str:
    r"""Half of a surrogate pair (`"\ud800"` is valid JSON) is written as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def field_of(row: Mapping[str, Any], name: str) -> str | None:
    """A field of a `metadata` row by the name that its source used: a column, or an entry of `extra`."""
    for column, names in _NAMES.items():
        if name in names and row.get(column) is not None:
            return str(row[column])
    value = json.loads(row["extra"]).get(name) if row.get("extra") else None
    return None if value is None else str(value)
