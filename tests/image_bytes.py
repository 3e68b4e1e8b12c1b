"""Bytes of images of odd kinds, written by hand from their specifications."""

import struct
import zlib

import numpy as np


def tiff(strip: bytes, size: tuple[int, int], tags: dict[int, tuple[int, ...] | bytes | float]) -> bytes:
    """An uncompressed TIFF of one strip (TIFF 6.0): bytes become ASCII, floats FLOAT, tuples SHORTs."""
    width, height = size
    whole: dict[int, tuple[int, ...] | bytes | float | int] = {256: (width,), 257: (height,), 259: (1,), 273: 0, **tags}
    whole |= {278: (height,), 279: len(strip)}
    fields, tail = [], b""
    start = 8 + 2 + 12 * len(whole) + 4
    for tag, value in sorted(whole.items()):
        if tag == 273:
            fields.append((tag, 4, 1, b""))
            continue
        if isinstance(value, bytes):
            kind, count, packed = 2, len(value), value
        elif isinstance(value, float):
            kind, count, packed = 11, 1, struct.pack("<f", value)
        elif isinstance(value, int):
            kind, count, packed = 4, 1, struct.pack("<I", value)
        else:
            kind, count, packed = 3, len(value), struct.pack(f"<{len(value)}H", *value)
        if len(packed) > 4:
            fields.append((tag, kind, count, struct.pack("<I", start + len(tail))))
            tail += packed + b"\0" * (len(packed) % 2)
        else:
            fields.append((tag, kind, count, packed.ljust(4, b"\0")))
    where = struct.pack("<I", start + len(tail))
    body = b"".join(struct.pack("<HHI", t, k, c) + (v or where) for t, k, c, v in fields)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + body + b"\0\0\0\0" + tail + strip


def plain(samples: np.ndarray, **tags: tuple[int, ...] | bytes | float) -> bytes:
    """A TIFF of one channel; tags as `tag_340=...`."""
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    told = {int(name.removeprefix("tag_")): value for name, value in tags.items()}
    fixed = {258: (samples.dtype.itemsize * 8,), 262: (1,), 277: (1,), 339: (kind,)}
    return tiff(samples.tobytes(), (samples.shape[1], samples.shape[0]), {**fixed, **told})


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png16(samples: np.ndarray, colour: int, significant: bytes = b"") -> bytes:
    height, width = samples.shape[:2]
    rows = samples.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    said = png_chunk(b"sBIT", significant) if significant else b""
    pixels = png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + said + pixels
