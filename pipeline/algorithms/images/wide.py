"""Images whose samples have more than 8 bits -> RGB: what their files declare about them, and how they are read.

Pillow reads single channels of 16 or 32 bits or of floats, but keeps only the upper 8 bits of 16 if there are several
channels. If these are dark, or if Pillow does not know the kind of TIFF at all, OpenCV reads the samples.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from lodeset.pipeline.algorithms.images.containers import png_chunks
from lodeset.pipeline.algorithms.images.exif import ORIENTATION, entries, order_of
from lodeset.pipeline.algorithms.images.samples import MOST_FILLED, Declared, Range, Samples, boxes, finite, range_of

_BITS, _PHOTOMETRIC, _CHANNELS, _EXTRA, _FORMAT, _NODATA = 258, 262, 277, 338, 339, 42113
# (lowest, highest), as DNG and scientific software declare them, and in the older form of TIFF 6.0.
_EXTREMES = ((340, 341, "SMinSampleValue and SMaxSampleValue"), (280, 281, "MinSampleValue and MaxSampleValue"))
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_FEW = 0.001  # of all samples
_FULL_DEPTH = "0 to 65535 (the sample type's)"


def is_wide(opened: Image.Image) -> bool:
    """Whether Pillow returns more than 8 bits per sample, or signed samples."""
    if opened.mode == "L" and isinstance(opened, TiffImagePlugin.TiffImageFile):
        return _number(opened.tag_v2, _FORMAT) == _SIGNED
    return opened.mode[0] == "I" or opened.mode == "F"


def is_deep(opened: Image.Image, data: bytes) -> bool:
    """Whether Pillow would keep only the upper 8 of 16 bits of several channels. Checked before loading."""
    if opened.mode not in ("RGB", "RGBA", "LA"):
        return False
    args = getattr(opened, "tile", None) and opened.tile[0].args  # type: ignore[attr-defined]
    stored = args[0] if isinstance(args, tuple) else args
    if opened.format in ("PNG", "TIFF"):
        return isinstance(stored, str) and ";16" in stored
    if opened.format == "PPM":
        return isinstance(args, tuple) and args[-1] == 65535
    return opened.format == "JPEG2000" and _jpeg2000_bits(data) == 16


def declared(opened: Image.Image, data: bytes) -> Declared:
    """What the file of a wide or deep image declares about its samples."""
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        return tiff_declared(opened.tag_v2)
    if opened.format == "PNG":
        bits = next((max(body[:3]) for kind, body in png_chunks(data) if kind == b"sBIT" and body), 16)
        return Declared(bits=bits if 8 < bits < 16 else None, source=f"PNG sBIT: {bits} bits")
    if opened.format == "PPM":
        args = opened.tile[0].args if opened.tile else ()  # type: ignore[attr-defined]
        if isinstance(args, tuple) and args[0] != "F;32F" and args[-1] != 65535:
            # Pillow scales up to 16 bits.
            return Declared(low=0.0, high=65535.0, source=f"declared: {args[-1]} is white")
    if opened.format == "JPEG2000" and 8 < (bits := _jpeg2000_bits(data)) < 16:
        return Declared(low=0.0, high=65535.0, source=f"declared: {bits} bits")
    return Declared()


def tiff_declared(tags: Mapping[int, Any]) -> Declared:
    kind, bits = _number(tags, _FORMAT) or _UNSIGNED, int(_number(tags, _BITS) or 1)
    low, high, source = None, None, ""
    for lowest, highest, name in _EXTREMES:
        low, high = _number(tags, lowest), _number(tags, highest)
        if high is not None:
            source = f"TIFF {name}"
            low = 0.0 if low is None else low
            break
    if kind == _UNSIGNED and low == 0 and high == 2**bits - 1:
        # Some software fills this in automatically: it says no more than the type of the samples.
        low = high = None
    packed = bits if 8 < bits < 16 else None
    return Declared(
        bits=packed,
        low=low if high is not None else None,
        high=high,
        white_is_zero=_number(tags, _PHOTOMETRIC) == 0,
        nodata=_number(tags, _NODATA),
        signed={_UNSIGNED: False, _SIGNED: True}.get(int(kind)),
        source=source if high is not None else f"TIFF BitsPerSample: {bits}",
    )


def scaled(image: Image.Image, declaration: Declared) -> tuple[Image.Image, str]:
    """One channel of wide samples as RGB, and the range that was used."""
    tiles = list(boxes(*image.size))

    def stored(box: tuple[int, int, int, int]) -> NDArray[Any]:
        samples = np.asarray(image.crop(box))
        if declaration.signed is not None and samples.dtype.kind in "iu":
            samples = samples.view(f"{'i' if declaration.signed else 'u'}{samples.dtype.itemsize}")
        return samples

    kind = stored((0, 0, 1, 1)).dtype
    used = range_of(
        (finite(stored(box), declaration.nodata) for box in tiles), image.width * image.height, kind, declaration
    )
    grey = Image.new("L", image.size)
    for box in tiles:
        grey.paste(_grey(finite(stored(box), declaration.nodata), used, declaration), box)
    return grey.convert("RGB"), str(used)


def _grey(samples: Samples, used: Range, declaration: Declared) -> Image.Image:
    levels = used.applied(samples)
    return Image.fromarray(255 - levels if declaration.white_is_zero else levels)


def deepened(image: Image.Image, data: bytes, declaration: Declared) -> tuple[Image.Image, str]:
    """An image of which Pillow kept the upper 8 of 16 bits, with the lower bits if these are dark; and the range that
    was used.
    """
    colours = image.split()[:3] if image.mode in ("RGB", "RGBA") else image.split()[:1]
    if _has_bright(colours):
        return image, _FULL_DEPTH
    planes = _planes(data)
    if planes is None or planes.dtype != np.uint16 or planes.shape[:2] != (image.height, image.width):
        return image, _FULL_DEPTH
    # A fourth channel of a TIFF may be infrared.
    opacity = image.mode in ("RGBA", "LA") or "transparency" in image.info
    return coloured(planes, declaration, alpha=opacity and planes.shape[2] in (2, 4))


def _has_bright(colours: Sequence[Image.Image]) -> bool:
    """Whether more than a few samples are bright, not counting those at the maximum: frames, marks and hot pixels."""
    counts = np.sum([np.asarray(band.histogram()) for band in colours], axis=0)
    bright, top = int(counts[128:255].sum()), int(counts[255])
    return bool(bright > _FEW * counts.sum() or top > MOST_FILLED * counts.sum())


def coloured(planes: NDArray[Any], declaration: Declared, alpha: bool) -> tuple[Image.Image, str]:
    """Samples [height, width, channels] as "RGB" or "RGBA", and the range that was used."""
    height, width, channels = planes.shape
    colours = planes[..., : 3 if channels >= 3 else 1]
    tiles = list(boxes(width, height))

    def tile(of: NDArray[Any], box: tuple[int, int, int, int]) -> Samples:
        return finite(of[box[1] : box[3], box[0] : box[2]], declaration.nodata)

    used = range_of((tile(colours, box) for box in tiles), colours.size, planes.dtype, declaration)
    out = Image.new("RGBA" if alpha else "RGB", (width, height))
    if alpha:
        opacity = planes[..., -1]
        top = float(opacity.max())
        opaque = Range(0.0, used.high if top <= used.high else np.iinfo(planes.dtype).max, "")
    for box in tiles:
        levels = used.applied(tile(colours, box))
        levels = 255 - levels if declaration.white_is_zero else levels
        levels = np.repeat(levels, 3, axis=2) if levels.shape[2] == 1 else levels
        if alpha:
            levels = np.dstack([levels, opaque.applied(tile(opacity, box))])
        out.paste(Image.fromarray(levels), box)
    return out, str(used)


def tiff_tags(data: bytes) -> Mapping[int, Any]:
    """The tags of the first directory, read by Pillow, which may read the tags of an image whose kind it does not
    know.
    """
    file = io.BytesIO(data)
    header = file.read(8)
    if header[2:4] in (b"+\0", b"\0+"):
        header += file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    return tags


def tiff_kind(tags: Mapping[int, Any]) -> str:
    """A description such as "3 x 32-bit float"."""
    kind = {_UNSIGNED: "unsigned", _SIGNED: "signed", _FLOAT: "float"}.get(int(_number(tags, _FORMAT) or 1), "other")
    return f"{_number(tags, _CHANNELS) or 1:g} x {_number(tags, _BITS) or 1:g}-bit {kind}"


def tiff_pixel_bytes(tags: Mapping[int, Any]) -> int:
    return math.ceil((_number(tags, _CHANNELS) or 1) * (_number(tags, _BITS) or 1) / 8)


def unknown_tiff(data: bytes, tags: Mapping[int, Any], size: tuple[int, int]) -> tuple[Image.Image, str | None] | None:
    """A TIFF of a kind that Pillow does not know, read by OpenCV; None if OpenCV does not know it, either."""
    planes = _planes(data)
    if planes is None or planes.shape[1::-1] != size:
        return None
    declaration = tiff_declared(tags)
    if planes.dtype == np.uint8 and (_number(tags, _BITS) or 1) > 8:
        return None  # OpenCV kept the upper bits
    if declaration.bits is not None and planes.dtype == np.uint16:
        planes = planes >> (16 - declaration.bits)  # OpenCV moves them up
    extra = _number(tags, _EXTRA)
    alpha = planes.shape[2] in (2, 4) and extra in (1, 2) and planes.dtype.kind == "u"
    if planes.dtype == np.uint8:
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(planes.shape[2])
        return (Image.fromarray(planes.squeeze(), mode), None) if mode else None
    return coloured(planes, declaration, alpha)


def _planes(data: bytes) -> NDArray[Any] | None:
    """All samples [height, width, channels] at their full depth, colors in the order RGB; None if OpenCV cannot read
    them.

    Their size is checked before.
    """
    if data.startswith((b"II*\0", b"MM\0*")):
        data = _not_turned(data)
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if read is None:
        return None
    planes = read if read.ndim == 3 else read[..., None]
    return planes[..., [2, 1, 0, *range(3, planes.shape[2])]] if planes.shape[2] >= 3 else planes


def _not_turned(data: bytes) -> bytes:
    """A TIFF whose orientation is set to upright: OpenCV would rotate it, and Pillow's pixels are rotated later."""
    for entry in entries(data, 0):
        if entry.tag == ORIENTATION:
            upright = struct.pack("<HH" if order_of(data, 0) == "little" else ">HH", 1, 0)
            return data[: entry.at + 8] + upright + data[entry.at + 12 :]
    return data


def _jpeg2000_bits(data: bytes) -> int:
    """The bits of the first component in the header of the code stream (ITU-T T.800, annex A.5.1)."""
    at = data.find(b"\xff\x4f\xff\x51")
    return (data[at + 42] & 0x7F) + 1 if 0 <= at < len(data) - 42 else 0


_NUMBER = re.compile(r"\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)[\s\0]*")


def _number(tags: Mapping[int, Any], tag: int) -> float | None:
    """A tag's first value as a number; None if there is none, or it is malformed."""
    try:
        value: Any = tags.get(tag)
        value = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(value, str):
            match = _NUMBER.fullmatch(value)
            value = match[1] if match else None
        number = float(value) if value is not None else None
    except Exception:
        # Pillow parses a tag when it is accessed, and may raise any error.
        return None
    return number if number is not None and np.isfinite(number) else None
