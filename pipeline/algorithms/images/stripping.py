"""Remove locations from the bytes of an image and leave everything else unchanged: no pixel is encoded again.

GPS directories are emptied in place, so that no offset changes; numbers in XMP become blanks. Only chunks of PNG change
their length. The result depends only on the bytes: reading the source again gives the same image.
"""

from __future__ import annotations

import re
import struct
import zlib

from lodeset.pipeline.algorithms.images.containers import PNG_SIGNATURE, png_chunk
from lodeset.pipeline.algorithms.images.exif import Entry, blocks, entries, order_of
from lodeset.pipeline.algorithms.images.located import GPS, LOCATION_TAGS, XMP

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_TIFF = (b"II*\0", b"MM\0*")
# In HEIF and AVIF, an offset of 0 precedes EXIF.
_IN_HEIF = re.compile(rb"\0\0\0\0(?=II\*\0|MM\0\*)")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MOST_TEXT = 2**24


def without_location(data: bytes) -> bytes:
    """The same file without GPS in EXIF, XMP or the tags of a TIFF; parts that are not understood stay."""
    if data.startswith(PNG_SIGNATURE):
        return _png(data)
    out = bytearray(data)
    starts = list(blocks(data))
    if data.startswith(_TIFF):
        starts.insert(0, 0)
    if data[4:8] == b"ftyp":
        starts += [match.end() for match in _IN_HEIF.finditer(data)]
    for start in starts:
        _empty(out, start)
    _blank(out)
    return bytes(out)


def _empty(out: bytearray, start: int) -> None:
    """Remove the location entries of the first directory, with everything that they point to."""
    for _ in range(16):
        in_directory = list(entries(bytes(out), start))
        chosen = next((n for n, entry in enumerate(in_directory) if entry.tag in LOCATION_TAGS), None)
        if chosen is None:
            return
        entry = in_directory[chosen]
        if entry.tag == GPS:
            _erase_directory(out, start, entry)
        else:
            _erase_value(out, start, entry)
        first, end = in_directory[0].at, in_directory[-1].at + 12
        order = order_of(bytes(out[: start + 2]), start)
        # The following entries and the offset of the next directory move up.
        out[entry.at : end + 4] = out[entry.at + 12 : end + 4] + bytes(12)
        out[first - 2 : first] = (len(in_directory) - 1).to_bytes(2, order)


def _erase_directory(out: bytearray, start: int, pointer: Entry) -> None:
    data = bytes(out)
    where = int.from_bytes(pointer.value, order_of(data, start))
    inside = list(entries(data, start, where))
    for entry in inside:
        _erase_value(out, start, entry)
        out[entry.at : entry.at + 12] = bytes(12)
    if inside:
        out[inside[0].at - 2 : inside[0].at] = bytes(2)


def _erase_value(out: bytearray, start: int, entry: Entry) -> None:
    size = _SIZES.get(entry.kind, 1) * entry.count
    at = start + int.from_bytes(entry.value, order_of(bytes(out[: start + 2]), start))
    if 4 < size <= len(out) - at:
        out[at : at + size] = bytes(size)


def _blank(out: bytearray) -> None:
    for match in list(XMP.finditer(bytes(out))):
        begin = match.start(1)
        out[begin : match.end(1)] = b" " * (match.end(1) - begin)


def _png(data: bytes) -> bytes:
    out, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        whole, body = data[at : at + 12 + length], data[at + 8 : at + 8 + length]
        at += 12 + length
        if kind == b"eXIf":
            changed = bytearray(body)
            _empty(changed, 6 if body.startswith(b"Exif\0\0") else 0)
            out.append(png_chunk(kind, bytes(changed)) if changed != body else whole)
        elif kind not in _TEXTS or not _text_says_place(kind, body):
            out.append(whole)
        if kind == b"IEND":
            break
    return b"".join(out) + data[at:]


def _text_says_place(kind: bytes, body: bytes) -> bool:
    """Whether XMP in a text chunk contains a location, or the chunk is EXIF as ImageMagick writes it; such a chunk is
    removed as a whole.
    """
    key, _, rest = body.partition(b"\0")
    if key.startswith(b"Raw profile type"):
        return True
    packed = rest[1:] if kind == b"zTXt" else rest.split(b"\0", 3)[-1] if kind == b"iTXt" and rest[:1] == b"\1" else b""
    try:
        text = zlib.decompressobj().decompress(packed, _MOST_TEXT) if packed else rest
    except zlib.error:
        text = rest
    return XMP.search(text) is not None
