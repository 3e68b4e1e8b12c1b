"""Columns of Parquet files that hold images: which one is meant, and encoded bytes out of its cells, however they are kept there."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lodeset.pipeline.shown import shown
from lodeset.pipeline.sources.metadata import is_known

# What columns of images are called, where their type alone does not say what they hold.
_NAMES = re.compile(
    r"(?i)^(img|image|photo|picture|pic|jpe?g|png|webp|bytes|content|data|pixel_values)s?([._-]?(bytes|data|base64|b64|binary))?$"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+=*\s*")
_DATA_URL = re.compile(r"data:[\w.+/;=-]*;base64,")
# The first bytes of encoded images.
_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"BM",
    b"RIFF",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP",
    b"\xff\x4f\xff\x51",
    b"\xff\x0a",
)
_BRAND = b"ftyp"  # AVIF and HEIF, behind four bytes of length
_MOST_ITEMS = 1_000
_MOST_NAMED = 12


class NoImages(ValueError):
    """The file has no column of encoded images under the name that was given. `meant`: another one may be what is wanted."""

    def __init__(self, message: str, meant: bool) -> None:
        super().__init__(message)
        self.meant = meant


class NotEncoded(ValueError):
    """A cell holds something else than an encoded image."""


@dataclass(frozen=True)
class Column:
    """A column of images: the path in the schema that is read, and what its cells hold."""

    name: str
    path: str
    many: bool  # a list of images


def column_of(schema: pa.Schema, wanted: str) -> Column:
    """The column that is called so, in whatever capitals.

    Raises:
        NoImages: there is none, more than one, or it holds no encoded images; says which columns there are.
    """
    exact = [field for field in schema if field.name == wanted]
    found = exact or [field for field in schema if field.name.lower() == wanted.lower()]
    if len(found) > 1:
        raise NoImages(f"{len(found)} columns `{wanted}`; there are: {_listed(schema)}", meant=True)
    if not found:
        likely = [field.name for field in schema if _likely(field)]
        hint = f" (`image: {likely[0]}` may be meant)" if likely else ""
        raise NoImages(f"no column `{wanted}`{hint}; there are: {_listed(schema)}", meant=bool(likely))
    (field,) = found
    kind, many = stored_type(field.type), False
    if _is_list(kind) and not pa.types.is_integer(stored_type(kind.value_type)):
        kind, many = stored_type(kind.value_type), True
    if pa.types.is_struct(kind):
        inner = _payload(kind)
        if inner is None:
            raise NoImages(
                f"column `{field.name}` holds {_kind(field.type)}, without a field `bytes` of encoded images",
                meant=True,
            )
        return Column(field.name, field.name if many else f"{field.name}.{inner}", many)
    if not (is_binary(kind) or _is_text(kind) or pa.types.is_null(kind) or (_is_list(kind) and not many)):
        raise NoImages(
            f"column `{field.name}` holds {_kind(field.type)}, not encoded images (JPEG, PNG, ...): encode what are pixels, or name "
            "another column with `image:`",
            meant=True,
        )
    return Column(field.name, field.name, many)


def _likely(field: pa.Field) -> bool:
    kind = stored_type(field.type)
    kind = stored_type(kind.value_type) if _is_list(kind) else kind
    if pa.types.is_struct(kind):
        return _payload(kind) is not None
    return (is_binary(kind) and not is_known(field.name)) or bool(_NAMES.match(field.name))


def _payload(kind: pa.StructType) -> str | None:
    """The field of a struct that holds the image: `bytes`, or the only one of bytes."""
    inner = [kind.field(n) for n in range(kind.num_fields)]
    named = [f.name for f in inner if f.name.lower() == "bytes"]
    binary = [f.name for f in inner if is_binary(stored_type(f.type))]
    return named[0] if named else binary[0] if len(set(binary)) == 1 else None


def stored_type(kind: pa.DataType) -> pa.DataType:
    while pa.types.is_dictionary(kind) or isinstance(kind, pa.BaseExtensionType):
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind.storage_type
    return kind


def is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        test(kind)
        for test in (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    )


def _is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _listed(schema: pa.Schema) -> str:
    told = [f"{field.name} ({_kind(field.type)})" for field in list(schema)[:_MOST_NAMED]]
    more = len(schema) - len(told)
    return ", ".join(told) + (f" and {more} more" if more > 0 else "")


def _kind(kind: pa.DataType) -> str:
    told = shown(str(kind))
    return told if len(told) <= 60 else f"{told[:57]}..."


# -- cells


def images_of(cell: Any, many: bool) -> Iterator[tuple[str, Any]]:
    """(what is put behind the row's number in a member's name, the cell of one image): lists hold several.

    Raises:
        NotEncoded: more of them than any row of a dataset holds.
    """
    if not many:
        yield "", cell
    elif cell.is_valid:
        values = cell.values
        if len(values) > _MOST_ITEMS:
            raise NotEncoded(f"a list of {len(values)} images in one cell, more than {_MOST_ITEMS}")
        for index in range(len(values)):
            yield f".{index}", values[index]


def image_bytes(cell: Any) -> bytes:
    """The encoded image of one cell: bytes, base64 or hexadecimal text, numbers that are bytes, or a struct that holds such.

    Raises:
        NotEncoded: it holds something else, or nothing; what pyarrow raises for values that cannot be converted.
    """
    while isinstance(cell, pa.DictionaryScalar | pa.ExtensionScalar):
        cell = cell.value
    if cell is None or not cell.is_valid:
        return b""
    if pa.types.is_struct(cell.type):
        name = _payload(cell.type)
        found = b"" if name is None else image_bytes(cell[name])
        if not found:
            raise NotEncoded(
                "the cell has no bytes; a path beside them is not followed: put the encoded image into the column"
            )
        return found
    if _is_text(cell.type):
        raw = cell.as_buffer().to_pybytes()
        return raw if is_encoded(raw) else _from_text(raw.decode())
    value = cell.as_py()
    if isinstance(value, bytes):
        return value if is_encoded(value) else _from_ascii(value)
    if isinstance(value, list):
        return _from_numbers(value)
    raise NotEncoded(f"the cell holds a {type(value).__name__}, not an encoded image")


def _from_ascii(raw: bytes) -> bytes:
    """Text in a column of bytes; what is none stays as it is, for the decoder to name."""
    try:
        return _from_text(raw.decode("ascii"))
    except (UnicodeDecodeError, NotEncoded):
        return raw


def _from_text(text: str) -> bytes:
    packed = _DATA_URL.sub("", text, count=1) if text.startswith("data:") else text
    found: bytes | None = None
    digits = packed.removeprefix("\\x").removeprefix("0x")
    if re.fullmatch(r"[0-9a-fA-F]{16,}", digits) and len(digits) % 2 == 0:
        found = bytes.fromhex(digits)
    if (found is None or not is_encoded(found)) and _BASE64.fullmatch(packed):
        bare = re.sub(r"\s", "", packed).rstrip("=").replace("-", "+").replace("_", "/")
        try:
            found = base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
        except binascii.Error:
            found = None
    if found is None or not is_encoded(found):
        raise NotEncoded(
            f"the cell holds text ({shown(text[:40])!r}), not an encoded image: paths and addresses are not followed"
        )
    return found


def _from_numbers(values: Sequence[Any]) -> bytes:
    try:
        found = bytes(value & 0xFF if -128 <= value < 0 else value for value in values)  # Java's bytes have a sign
    except (TypeError, ValueError):
        found = b""
    if not is_encoded(found):
        raise NotEncoded(f"the cell holds a list of {len(values)} numbers, such as pixels, not an encoded image")
    return found


def is_encoded(data: bytes) -> bool:
    """Whether bytes start like an encoded image."""
    netpbm = len(data) > 2 and data[:1] == b"P" and data[1:2] in b"1234567" and data[2:3].isspace()
    return data.startswith(_SIGNATURES) or data[4:8] in (_BRAND, b"JXL ") or netpbm


# -- what columns mean


def class_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """The classes of Hugging Face's `ClassLabel` columns, which hold a number a row: column -> names."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found: dict[str, Sequence[str]] = {}
        for column, feature in features.items():
            names = feature.get("names") if isinstance(feature, Mapping) else None
            if (
                isinstance(names, list)
                and feature.get("_type") == "ClassLabel"
                and all(isinstance(n, str) for n in names)
            ):
                found[column] = names
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # whoever wrote it, it is no reason to lose the images


def named(value: Any, names: Sequence[str] | None) -> Any:
    """The class's name for its number; -1 stands for none."""
    if names is None or isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        return value
    return names[int(value)] if 0 <= value < len(names) else None if value == -1 else value
