"""The containers of JPEG, PNG and WebP: files without their metadata, and files whose end is missing.

Nothing here decodes pixels, and no length is trusted: inconsistent data give None, and the file stays unchanged.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IEND = b"IEND\xaeB`\x82"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04  # ICC, EXIF, XMP
_EOI, _SOS = b"\xff\xd9", b"\xff\xda"
_FILLER = bytes(range(1, 255)) * 64  # contains no marker


def without_metadata(data: bytes) -> bytes | None:
    """The same pixels without profiles, texts and EXIF; None if the container is not understood."""
    if data.startswith(b"\xff\xd8"):
        return _bare_jpeg(data)
    if data.startswith(PNG_SIGNATURE):
        kept = [png_chunk(kind, body) for kind, body in png_chunks(data) if kind in _PNG_PIXELS]
        return PNG_SIGNATURE + b"".join(kept) if kept else None
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        chunks = _webp_pixels(data)
        return _webp(chunks) if chunks and all(len(body) == length for _, body, length in chunks) else None
    return None


def lacks_end(data: bytes, image_format: str | None) -> bool:
    """Whether the end marker of such a file is missing. Cheap, because every image is checked."""
    if image_format in ("JPEG", "MPO"):
        return not data.endswith(_EOI) and data.rfind(_EOI) < data.rfind(_SOS)
    if image_format == "PNG":
        return not data.endswith(_IEND) and data.rfind(_IEND) < 0
    return image_format == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)


@dataclass(frozen=True)
class Completed:
    """A truncated file with an artificial end; `missing` is the share of the pixels that the artificial end determines.

    If that is unknown (None), `other` has a different artificial end: the pixels in which the two differ are
    artificial.
    """

    data: bytes
    missing: float | None
    other: bytes = b""


def completed(data: bytes, max_pixels: int) -> Completed | None:
    """The completed file; None if no end can be made up."""
    if data.startswith(b"\xff\xd8"):
        return _ended_jpeg(data)
    if data.startswith(PNG_SIGNATURE):
        return _ended_png(data, max_pixels)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _ended_webp(data)
    if data.startswith((b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")):
        # Rows of samples, for the most part: what is missing is more of them.
        length = max(1_024, len(data) // 16)
        return Completed(data + b"\0" * length, None, data + b"\x55" * length)
    return None


# -- JPEG (ITU-T T.81, annex B)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the segments before the first scan, including markers, and of everything from the first
    scan on.

    Stops at inconsistent lengths.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:
            yield marker, at, len(data)
            return
        standalone = marker == 0x01 or 0xD0 <= marker <= 0xD8
        end = at + 2 + (0 if standalone else int.from_bytes(data[at + 2 : at + 4], "big"))
        if end > len(data) or (not standalone and end < at + 4):
            return
        yield marker, at, end
        at = end


def _bare_jpeg(data: bytes) -> bytes | None:
    kept, scans = [data[:2]], False
    for marker, start, end in jpeg_segments(data):
        adobe = (
            marker == 0xEE and end >= start + 16 and data[start + 4 : start + 9] == b"Adobe"
        )  # how colors are stored
        if adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[start:end])
        scans = scans or marker == 0xDA
    return b"".join(kept) if scans else None


def _ended_jpeg(data: bytes) -> Completed | None:
    for marker in (_SOS, b"\xff\xc4"):  # the header of a scan that is missing
        at = data.rfind(marker)
        if at >= 0 and at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") > len(data):
            data = data[:at]
    data = data.rstrip(b"\xff")
    if b"\xff\xda" not in data or (b"\xff\xc2" in data and not _has_last_scans(data)):
        return None
    return Completed(data + _EOI, None, data + _FILLER + _EOI)


def _has_last_scans(data: bytes) -> bool:
    """Whether a progressive JPEG contains the last scan of its luminance; without it, the whole picture is coarse.

    A scan's header lists its component and coefficients, and the lowest bit: the last scan goes down to bit 0.
    """
    first, whole = None, False
    at = data.find(_SOS)
    while at >= 0:
        count = data[at + 4] if at + 4 < len(data) else 0
        rest = data[at + 5 + 2 * count : at + 8 + 2 * count]
        if len(rest) == 3 and 1 <= count <= 4:
            first = data[at + 5] if first is None else first
            _, last_coefficient, bits = rest
            whole = whole or (data[at + 5] == first and last_coefficient == 63 and bits & 15 == 0)
        at = data.find(_SOS, at + 2)
    return whole


# -- PNG


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of the chunks; the body of the last one may be incomplete."""
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        yield kind, data[at + 8 : at + 8 + length]
        at += 12 + length


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _ended_png(data: bytes, max_pixels: int) -> Completed | None:
    chunks = list(png_chunks(data))
    if not chunks or chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        return None
    width, height, depth, colour, *_, interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour)
    if samples is None or width * height > max_pixels:
        return None
    expected = _png_bytes(width, height, depth * samples, interlaced)
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"), expected)
    except zlib.error:
        return None
    kept = [(kind, body) for kind, body in chunks if kind in (b"IHDR", b"PLTE", b"tRNS")]
    rows = zlib.compress(raw + b"\0" * (expected - len(raw)), 1)
    ended = b"".join(png_chunk(kind, body) for kind, body in [*kept, (b"IDAT", rows), (b"IEND", b"")])
    return Completed(PNG_SIGNATURE + ended, 1 - len(raw) / max(1, expected))


def _png_bytes(width: int, height: int, bits: int, interlaced: int) -> int:
    """The length of the filtered rows, including filter bytes (PNG specification, sections 7.2 and 8.2)."""
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    total = 0
    for x, y, dx, dy in passes:
        columns, rows = max(0, -(-(width - x) // dx)), max(0, -(-(height - y) // dy))
        total += rows * (1 + -(-columns * bits // 8)) if columns else 0
    return total


# -- WebP (RFC 9649)


def _webp_pixels(data: bytes) -> list[tuple[bytes, bytes, int]]:
    """(kind, body, declared length) of the chunks that hold pixels; the body of the last one may be incomplete."""
    chunks, at = [], 12
    while at + 8 <= len(data):
        kind, length = struct.unpack("<4sI", data[at : at + 8])
        if kind in _WEBP_PIXELS:
            chunks.append((kind, data[at + 8 : at + 8 + length], length))
        at += 8 + length + length % 2
    return chunks


def _ended_webp(data: bytes) -> Completed | None:
    """Complete a WebP. The decoder reads missing bytes as zeros and tolerates hardly anything else. Pixels are stored
    from the top down, so their missing share is about that of the bytes; it is doubled, because some bytes at the start
    concern all pixels.
    """
    chunks = _webp_pixels(data)
    promised = sum(length for _, _, length in chunks)
    missing = promised - sum(len(body) for _, body, _ in chunks)
    if not chunks or missing > promised // 16:
        return None
    filled = [(kind, body + b"\0" * (length - len(body)), length) for kind, body, length in chunks]
    return Completed(_webp(filled), 2 * missing / promised)


def _webp(chunks: list[tuple[bytes, bytes, int]]) -> bytes:
    out = []
    for kind, body, _ in chunks:
        if kind == b"VP8X" and body:
            body = bytes([body[0] & ~_WEBP_METADATA_FLAGS]) + body[1:]
        out.append(struct.pack("<4sI", kind, len(body)) + body + b"\0" * (len(body) % 2))
    inner = b"WEBP" + b"".join(out)
    return b"RIFF" + struct.pack("<I", len(inner)) + inner
