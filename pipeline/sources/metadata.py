"""What a source says about an image: label, caption, URL, licence, and the rest as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 2**20  # of one sidecar

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


class BadMetadata(Exception):
    """This sidecar says nothing that can be read."""


def from_fields(fields: Mapping[str, Any]) -> Metadata:
    """Known names become columns, the others `extra`; location tags are dropped."""
    left = {str(k): v for k, v in fields.items() if not _PLACE.match(str(k)) and v is not None}
    known: dict[str, str] = {}
    for column, names in _NAMES.items():
        for name in names:
            if name in left and isinstance(left[name], str | int | float | bool):
                known[column] = _text(str(left.pop(name)))
                break
    extra = _text(json.dumps(_plain(left), sort_keys=True, ensure_ascii=False)) if left else None
    return Metadata(**known, extra=extra)


def fields_of(extension: str, data: bytes) -> dict[str, Any]:
    """What one sidecar (`.json`, `.txt` or `.cls`) says.

    Raises:
        BadMetadata: says why it cannot be read.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadMetadata(f"{extension} is not UTF-8") from None
    if extension != ".json":
        return {"caption" if extension == ".txt" else "label": text.strip()}
    try:
        tree = _plain(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise BadMetadata(f"{extension}: {error}") from None
    if not isinstance(tree, dict):
        raise BadMetadata(f"{extension} holds a {type(tree).__name__}, not an object")
    return tree


def _text(value: str) -> str:
    """Lone surrogates, which JSON can spell and UTF-8 cannot hold, become question marks."""
    return value.encode("utf-8", "replace").decode("utf-8")


def _plain(value: Any) -> Any:
    """The value as JSON can hold it; bytes and other binaries are left out."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if not _PLACE.match(str(k))}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)[:1000]


def field_of(row: Mapping[str, Any], name: str) -> str | None:
    """A field of a `metadata` row by the name that its source used: a column, or an entry of `extra`."""
    for column, names in _NAMES.items():
        if name in names and row.get(column) is not None:
            return str(row[column])
    value = json.loads(row["extra"]).get(name) if row.get("extra") else None
    return None if value is None else str(value)
