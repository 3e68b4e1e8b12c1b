"""Read the few EXIF tags that lodeset needs. Malformed tags do not hide other ones, and nothing is written back."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

ORIENTATION = 274
_HEADERS = rb"(?=II\*\0|MM\0\*)"
# Prefix of a TIFF structure in JPEG and most other formats, in PNG, and in WebP.
_BEFORE = re.compile(rb"(?:Exif\0\0|eXIf|EXIF[\x00-\xff]{4}(?:Exif\0\0)?)" + _HEADERS)
_MOST_ENTRIES = 4_096
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Entry:
    """One entry of a TIFF directory: `at` is the position of its 12 bytes, `value` their last four."""

    at: int
    tag: int
    kind: int
    count: int
    value: bytes


def blocks(data: bytes) -> Iterator[int]:
    """Positions of the TIFF structures of EXIF in a file."""
    return (match.end() for match in _BEFORE.finditer(data))


def entries(data: bytes, start: int, directory: int | None = None) -> Iterator[Entry]:
    """The entries of a directory (the first one, or that at an offset) of the TIFF structure that begins at `start`."""
    order = order_of(data, start)
    if directory is None:
        directory = int.from_bytes(data[start + 4 : start + 8], order)
    at = start + directory
    count = int.from_bytes(data[at : at + 2], order)
    for entry in range(at + 2, at + 2 + 12 * min(count, _MOST_ENTRIES), 12):
        if directory < 8 or entry + 12 > len(data):
            return
        tag, kind, length = struct.unpack(("<" if order == "little" else ">") + "HHI", data[entry : entry + 8])
        yield Entry(entry, tag, kind, length, data[entry + 8 : entry + 12])


def order_of(data: bytes, start: int) -> Literal["little", "big"]:
    return "little" if data[start : start + 2] == b"II" else "big"


def orientation(block: bytes) -> int | None:
    """The orientation in an EXIF block, or None."""
    start = 6 if block.startswith(b"Exif\0\0") else 0
    for entry in entries(block, start):
        if entry.tag == ORIENTATION:
            size = {1: 1, 3: 2, 4: 4}.get(entry.kind, 2)
            return valid(int.from_bytes(entry.value[:size], order_of(block, start)))
    return None


def orientation_in(data: bytes) -> int | None:
    """The orientation of the first EXIF block of a file."""
    start = next(blocks(data), None)
    return None if start is None else orientation(data[start:])


def valid(value: object) -> int | None:
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def tiff_orientation(tags: Mapping[int, Any]) -> int | None:
    """The orientation among the tags of a TIFF, as Pillow reads them."""
    try:
        return valid(tags.get(ORIENTATION))
    except Exception:
        return None  # Pillow parses a tag when it is accessed


def upright(image: Image.Image, turn: int | None) -> Image.Image:
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image
