"""Metadata that says where a picture was taken, or only seems to."""

from builders import textured
from PIL import Image

PICTURE = textured(5)


def exif(place: bool, version: bool = True) -> Image.Exif:
    out = Image.Exif()
    out[0x010F] = "a camera"
    gps = out.get_ifd(0x8825)
    if version:
        gps[0] = b"\2\3\0\0"
    if place:
        gps |= {1: "N", 2: (48.0, 12.0, 30.0), 3: "E", 4: (16.0, 22.0, 0.0)}
    return out


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description {}/></x:xmpmeta>'
