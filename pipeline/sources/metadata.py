"""What a source says about an image: label, caption, URL, licence, and the rest as JSON."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from lodeset.pipeline.sources.places import is_place, says_place

# Of one sidecar, or of the texts of a Parquet row together.
MAX_BYTES = 2**20
# Python's own recursion ends at about 1,000 calls, those of Beam included.
MAX_DEPTH = 64

# Keys of sources, whatever their capitals and signs (`URL`, `Image-URL`, `imageUrl`); of several the first counts.
_NAMES = {
    "label": ("label", "cls", "class", "class_name", "class_label", "label_name", "category"),
    "caption": ("caption", "text", "txt", "alt", "alt_text"),
    "url": ("url", "source_url", "image_url", "img_url", "original_url", "content_url"),
    "licence": ("licence", "license"),
}
# A key of a Hive partition, and the value that stands for none.
_KEY = re.compile(r"[A-Za-z_][\w-]{0,63}")
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


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


def from_fields(*layers: Mapping[str, Any]) -> Metadata:
    """Plain fields (see `plain`): known names become columns, the others `extra`. A later layer stands above those before it."""
    known: dict[str, str] = {}
    extra: dict[str, Any] = {}
    for layer in layers:
        left = {name: value for name, value in layer.items() if value is not None and not is_place(name, value)}
        for column, name in _known(left).items():
            value = told(left.pop(name))
            known[column] = label_text(value) if column == "label" else value
        extra |= left
    return Metadata(**known, extra=json.dumps(extra, sort_keys=True, ensure_ascii=False) if extra else None)


def _known(fields: Mapping[str, Any]) -> dict[str, str]:
    """The columns that these fields fill, and the name of the field."""
    spelt: dict[str, str] = {}
    for name, value in fields.items():
        # Exactly as known, rather than in another spelling.
        if isinstance(value, str | int | float | bool) and (_plainly(name) not in spelt or name in _EXACT):
            spelt[_plainly(name)] = name
    found = {}
    for column, names in _SPELT.items():
        chosen = next((spelt[name] for name in names if name in spelt), None)
        if chosen is not None:
            found[column] = chosen
    return found


def is_known(name: str) -> bool:
    """Whether a field of this name becomes a column: label, caption, URL or licence."""
    return any(_plainly(name) in names for names in _SPELT.values())


def _plainly(name: str) -> str:
    """A key without what people spell differently."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


_SPELT = {column: tuple(map(_plainly, names)) for column, names in _NAMES.items()}
_EXACT = frozenset(name for names in _NAMES.values() for name in names)


def told(value: Any) -> str:
    """A value as text. A column of integers comes back as floats where a value is missing, and 3.0 is 3."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value).strip("\ufeff")


def label_text(text: str) -> str:
    """One spelling of a class: 3.0 is 3 in text files, too."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip())


def partition_fields(path: str) -> dict[str, str]:
    """What the folders of a path say in Hive's way: `label=cat/split=test/1.jpg`."""
    found = {}
    for folder in path.split("/")[:-1]:
        key, sign, value = folder.partition("=")
        value = unquote(value, errors="backslashreplace")
        if sign and _KEY.fullmatch(key) and value and value != _NO_PARTITION:
            found[key] = value
    return found


def fields_of(extension: str, data: bytes) -> dict[str, Any]:
    """The plain fields of one `.json`, `.txt` or `.cls` member.

    Raises:
        BadMetadata: says why.
    """
    # Windows' editors mark what they save by its byte order.
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise BadMetadata("not UTF-8") from None
    if extension != ".json":
        return {"caption" if extension == ".txt" else "label": text.strip()}
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadMetadata(f"is not JSON: {error}") from None
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
        fields = {_valid(str(k)): plain(v, depth + 1) for k, v in value.items() if not is_place(str(k), v)}
        return {k: v for k, v in fields.items() if not says_place(v)}
    if isinstance(value, list | tuple):
        return [plain(v, depth + 1) for v in value if not says_place(v)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, int | float):
        return value
    return _text(value, depth) if isinstance(value, str) else _valid(str(value)[:1000])


def _text(value: str, depth: int) -> str:
    """Text; where it is JSON itself, less what that says of places."""
    if value.lstrip()[:1] in ("{", "[", '"'):
        try:
            tree = json.loads(value)
            kept = plain(tree, depth + 1)
        except (ValueError, RecursionError, BadMetadata):
            return _valid(value)
        if kept != tree:
            return json.dumps(kept, ensure_ascii=False)
    return _valid(value)


def _valid(text: str) -> str:
    r"""Half of a surrogate pair (`"\ud800"` is valid JSON) is written as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def field_of(row: Mapping[str, Any], name: str) -> str | None:
    """A field of a `metadata` row by the name that its source used, or by another spelling of it."""
    extra = json.loads(row["extra"]) if row.get("extra") else {}
    value = extra.get(name)
    if value is None:
        value = next(
            (row.get(c) for c, names in _SPELT.items() if _plainly(name) in names and row.get(c) is not None), None
        )
    if value is None:
        value = next((v for key, v in extra.items() if _plainly(key) == _plainly(name) != ""), None)
    return None if value is None else told(value)
