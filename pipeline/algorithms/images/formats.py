"""Formats that Pillow does not read by itself: HEIC and other images in HEIF, by `pillow-heif`; JPEG XL, by
`imagecodecs`.

Both come with the extra `formats`. If they are not installed, the rejection of an image says how to install them.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEIF, JXL = "HEIF", "JXL"
_MODULES = {HEIF: "pillow_heif", JXL: "imagecodecs"}
_HEIF_BRANDS = (
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"hevx",
    b"hevm",
    b"hevs",
    b"mif1",
    b"msf1",
    b"mif2",
    b"avci",
)
_AVIF_BRANDS = (b"avif", b"avis")  # Pillow reads these itself
# Pictures that are not read here: (position, bytes there, name). Named explicitly, because "not an image" would be
# wrong.
_UNREAD = (
    (8, b"CR\x02", "a camera's raw file (CR2)"),
    (4, b"ftypcrx", "a camera's raw file (CR3)"),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file (RAF)"),
    (0, b"IIRO", "a camera's raw file (ORF)"),
    (0, b"IIU\0", "a camera's raw file (RW2)"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"DDS ", "a DDS texture"),
    (0, b"qoif", "QOI"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"\x01\xda", "SGI"),
    (0, b"P7\n", "PAM"),
    (0, b"PF\n", "PFM in color"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
)
_JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
# Aspect ratios (width by height) that the header of JPEG XL abbreviates.
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


@dataclass(frozen=True)
class Optionally:
    """A format that needs an additional decoder."""

    name: str
    told: str  # for people


def optional_format(data: bytes) -> Optionally | None:
    """The optional format of these bytes, from their signature."""
    if data.startswith((b"\xff\x0a", _JXL_CONTAINER)):
        return Optionally(JXL, "JPEG XL")
    if data[4:8] != b"ftyp":
        return None
    brands = [data[at : at + 4] for at in (8, *range(16, min(int.from_bytes(data[:4], "big"), 128), 4))]
    if brands[0] in _AVIF_BRANDS or brands[0] not in _HEIF_BRANDS:
        return None
    # Generic HEIF brands may contain AV1 as well as HEVC.
    content = "HEIC" if not any(brand in _AVIF_BRANDS for brand in brands) else "AVIF in HEIF"
    return Optionally(HEIF, content)


def unread(data: bytes) -> str | None:
    """The name of the kind of picture, if it is one that is not read here."""
    return next((told for at, magic, told in _UNREAD if data[at : at + len(magic)] == magic), None)


@functools.cache
def installed() -> tuple[str, ...]:
    """The optional formats whose decoders are installed."""
    return tuple(name for name, module in _MODULES.items() if importlib.util.find_spec(module) is not None)


@functools.cache
def register_heif() -> None:
    """Register HEIF with Pillow."""
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)


def jxl_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header (ISO/IEC 18181-1, annex D), before anything is decoded.

    Raises:
        ValueError: there is no such header.
    """
    if data.startswith(_JXL_CONTAINER):
        data = _jxl_stream(data)
    if not data.startswith(b"\xff\x0a"):
        raise ValueError("no code stream")
    bits, at = int.from_bytes(data[2:16], "little"), 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        return (bits >> (at - count)) & ((1 << count) - 1)

    small = read(1)

    def side() -> int:
        return 8 * (1 + read(5)) if small else 1 + read((9, 13, 18, 30)[read(2)])

    height = side()
    ratio = read(3)
    if ratio == 0:
        return side(), height
    numerator, denominator = _RATIOS[ratio - 1]
    return height * numerator // denominator, height


def _jxl_stream(data: bytes) -> bytes:
    """The code stream in a container, or the first part of it."""
    at = 0
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        header = 16 if length == 1 else 8
        if kind in (b"jxlc", b"jxlp"):
            return data[at + header + (4 if kind == b"jxlp" else 0) :][:64]
        length = int.from_bytes(data[at + 8 : at + 16], "big") if length == 1 else length
        if length < header:
            break
        at += length
    raise ValueError("no code stream")


def jxl_planes(data: bytes) -> NDArray[Any]:
    """All samples [height, width, channels] of the first frame, upright."""
    import imagecodecs

    read = np.asarray(imagecodecs.jpegxl_decode(data, index=0, numthreads=1))
    return read if read.ndim == 3 else read[..., None]


# Common files among photographs that are not read as images, by their first bytes after a byte-order mark and white
# space.
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image itself (`git lfs pull` fetches it)"),
    (b"<svg", "an SVG drawing; only raster images are read"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"%pdf-", "a PDF document"),
    (b"8bps", "a Photoshop file: convert it to TIFF or PNG"),
    (b"\0\0\x01\0", "an icon (ICO): convert it to PNG"),
    (b"\xd0\xcf\x11\xe0", "an Office document or thumbnail cache"),
    (b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (b"sqlite format 3", "an SQLite database"),
)


def described(data: bytes) -> str:
    """A description of bytes that no decoder reads."""
    start = data[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, told in _OTHERS:
        if start.startswith(mark):
            return told
    if start.startswith(b"<?xml") and b"<svg" in data[:1024].lower():
        return "an SVG drawing; only raster images are read"
    if data[4:8] == b"ftyp":
        return "a video or another file in MP4's container"
    first = data[:8]
    text = "".join(map(chr, first)) if all(32 <= byte < 127 for byte in first) else ""
    return f"{len(data):,} bytes that start with {repr(text) if text else first.hex(' ')}, in no known image format"
