"""Whether an image's bytes contain the location where it was taken: in GPS tags of EXIF, of XMP, or of a TIFF
itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lodeset.pipeline.algorithms.images.exif import blocks, entries

GPS = 34853
# GPS tags, and tags that georeference a map (GeoTIFF 1.1, section 7).
LOCATION_TAGS = (GPS, 33922, 34264)
# `exif:GPSLatitude="..."`, `<drone-dji:GpsLongitude>`, and similar ones that are followed by a value.
XMP = re.compile(
    rb"gps(?:latitude|longitude|longtitude|position)[^<>=\"']{0,16}(?:=\s*[\"']|>)([^\"'<]*\d[^\"'<]*)", re.IGNORECASE
)
_XMP_KEYS = ("xmp", "XML:com.adobe.xmp")
# ImageMagick stores EXIF in PNG in hexadecimal.
_RAW_PROFILES = ("Raw profile type exif", "Raw profile type APP1")


def located(info: Mapping[Any, Any], tags: Mapping[int, Any] | None) -> bool:
    """From what Pillow found besides the pixels: `info`, and the tags of a TIFF. Cheap if there is nothing."""
    if tags is not None and any(tag in tags for tag in LOCATION_TAGS):
        return True
    exif = info.get("exif")
    if isinstance(exif, bytes) and _has_gps(exif):
        return True
    for key in _XMP_KEYS:
        packet = info.get(key)
        if packet and XMP.search(packet if isinstance(packet, bytes) else str(packet).encode("utf-8", "replace")):
            return True
    return any(key in info and _has_gps(_from_hexadecimal(str(info[key]))) for key in _RAW_PROFILES)


def location_in(data: bytes) -> bool:
    """The same for a file that Pillow does not open as it is: checks everything that looks like EXIF or XMP."""
    return any(_has_gps(data[start:]) for start in blocks(data)) or XMP.search(data) is not None


def _has_gps(block: bytes) -> bool:
    start = 6 if block.startswith(b"Exif\0\0") else 0
    for entry in entries(block, start):
        if entry.tag == GPS:
            where = int.from_bytes(entry.value, "little" if block[start : start + 2] == b"II" else "big")
            # Latitude or longitude: some cameras write a GPS directory with a version but without a location.
            return any(entry.tag in (2, 4) for entry in entries(block, start, where))
    return False


def _from_hexadecimal(profile: str) -> bytes:
    digits = "".join(profile.split("\n")[3:])
    try:
        return bytes.fromhex(digits)
    except ValueError:
        return b""
