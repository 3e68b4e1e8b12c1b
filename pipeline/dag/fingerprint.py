"""What a thing *is*, apart from where it lies and how fast it is made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel

from lodeset.pipeline.dag.files import reaching
from lodeset.pipeline.remote.file_system import opened
from lodeset.pipeline.shown import shown


@runtime_checkable
class Identified(Protocol):
    """A dataclass whose fingerprint is not simply that of its fields."""

    def identity(self) -> Mapping[str, Any]: ...


def optional() -> Any:
    """A dataclass field, None by default, that a fingerprint leaves out while it is None: adding one changes no fingerprint."""
    return dataclasses.field(default=None, metadata={"optional": True})


def canonical(value: Any, where: str = "") -> Any:
    """The value as JSON types with one spelling: mappings sorted, tuples as lists, models and dataclasses as mappings.

    Raises:
        TypeError: names the field whose value has no such spelling (a function, an open file, a NaN).
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where or 'value'} = {value} cannot be fingerprinted: it is not finite")
        return value
    if isinstance(value, BaseModel):
        return canonical({key: getattr(value, key) for key in type(value).model_fields}, where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return canonical(value.identity() if isinstance(value, Identified) else _fields(value), where)
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise TypeError(f"{where or 'mapping'} has the key {odd[0]!r}, which is not a string")
        return {key: canonical(value[key], f"{where}.{key}" if where else key) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [canonical(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    raise TypeError(f"{where or 'value'} is a {type(value).__name__}, which cannot be fingerprinted")


def _fields(value: Any) -> dict[str, Any]:
    named = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {field.name: held for field, held in named if not (held is None and field.metadata.get("optional"))}


def digest(*values: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of the values."""
    text = json.dumps(canonical(list(values)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str) -> str:
    """SHA-256 of a file's bytes, read through fsspec in blocks of 4 MiB."""
    total = hashlib.sha256()
    with reaching(shown(path)), opened(path) as file:
        while block := file.read(4 * 2**20):
            total.update(block)
    return total.hexdigest()
