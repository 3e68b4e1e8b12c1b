"""Encoded bytes -> identity, pixels and hashes.

*Pixels* mean the same everywhere in lodeset: the first frame, EXIF orientation applied, alpha composited over white,
CMYK, palette and grey converted to 8-bit RGB.
"""

from __future__ import annotations

import hashlib
import io
import math
import sys
import warnings
from dataclasses import dataclass

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

ID_HEX_DIGITS = 32
THUMBNAIL_SIDE = 32
_TILE = 1_024
_LONG_SIDE = 8_192

# Codecs that Pillow decodes within its own process and that images of the web use. Anything that shells out (EPS), parses
# scripts or fonts, or has no stated size (WMF) stays out. Pillow opens MPO stacks as JPEG; their first frame counts.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "AVIF": "avif",
    "JPEG2000": "jp2",
}

# Bytes that start so and cannot be opened are broken images, not something else.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*", b"\x00\x00\x00\x0cjP  ")

# Limits are checked against the header before any pixel is decoded, by lodeset itself (see `decode`).
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False


class Unreadable(Exception):
    """These bytes are not an image that can be decoded safely; `reason` is a column value of the `rejects` table."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # as given, or it could not be pickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Examined:
    """What ingest records of one image."""

    image_id: str
    width: int
    height: int
    format: str
    phash: int
    thumbnail: bytes


@dataclass(frozen=True)
class Limits:
    """What an image may ask for, by its header, before any pixel is decoded. Each knob is one of `ingest`."""

    max_pixels: int = 100_000_000
    max_side: int = 200_000
    max_decoded_mb: float = 1_024
    max_frames: int = 10_000


def image_id(data: bytes) -> str:
    """The first 128 bits of the SHA-256 of the encoded bytes, 32 hex digits."""
    return hashlib.sha256(data).hexdigest()[:ID_HEX_DIGITS]


def decode(data: bytes, max_pixels: int = 100_000_000) -> Image.Image:
    """Encoded bytes -> RGB pixels.

    Raises:
        Unreadable: `empty`, `not_an_image`, `corrupt`, or `too_many_pixels` (judged by the header, before decoding).
        MemoryError: says nothing about the image.
    """
    return _decode(data, Limits(max_pixels, max_side=max_pixels, max_decoded_mb=math.inf, max_frames=sys.maxsize))[0]


def _decode(data: bytes, limits: Limits) -> tuple[Image.Image, str]:
    if not data:
        raise Unreadable("empty", "0 bytes")
    with warnings.catch_warnings():
        # A codec's warning about odd metadata is no reason to reject an image whose pixels decode.
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            reason = "corrupt" if data.startswith(_SIGNATURES) else "not_an_image"
            raise Unreadable(reason, f"{len(data)} bytes start with {data[:8].hex()}") from None
        except MemoryError:
            raise
        except Exception as error:
            # Codecs raise whatever their parser meets (struct.error, SyntaxError, OverflowError, ...) on crafted bytes.
            raise Unreadable("corrupt", _short(error)) from error
        _check_header(opened, limits)
        try:
            opened.load()
            image_format = opened.format or ""
            return _to_rgb(opened), image_format
        except MemoryError:
            raise
        except Exception as error:
            raise Unreadable("corrupt", _short(error)) from error


def _check_header(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise Unreadable("corrupt", f"size {width} x {height}")
    if width * height > limits.max_pixels:
        told = f"{width} x {height} = {width * height} > {limits.max_pixels} (ingest.max_pixels)"
        raise Unreadable("too_many_pixels", told)
    if max(width, height) > limits.max_side:
        raise Unreadable("too_long_a_side", f"{width} x {height} > {limits.max_side} (ingest.max_side)")
    decoded_mb = width * height * len(image.getbands()) * _SAMPLE_BYTES.get(image.mode, 1) / 2**20
    if decoded_mb > limits.max_decoded_mb:
        told = f"{width} x {height} {image.mode} = {decoded_mb:.0f} MiB > {limits.max_decoded_mb:g} (ingest.max_decoded_mb)"
        raise Unreadable("too_many_decoded_bytes", told)
    frames = _frames(image)
    if frames > limits.max_frames:
        raise Unreadable("too_many_frames", f"{frames} frames > {limits.max_frames} (ingest.max_frames)")


# Bytes of a sample, where it is not one.
_SAMPLE_BYTES = {"I": 4, "F": 4, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}


def _frames(image: Image.Image) -> int:
    """How many frames the header promises. Other formats are not asked: Pillow would read a whole GIF or TIFF to count them,
    and only the first frame is decoded."""
    return int(getattr(image, "n_frames", 1)) if image.format in ("WEBP", "PNG", "AVIF") else 1


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _to_rgb(image: Image.Image) -> Image.Image:
    oriented = ImageOps.exif_transpose(image) if "exif" in image.info or image.format in ("TIFF", "MPO") else image
    if oriented.mode == "RGB" and "transparency" not in oriented.info:
        return oriented
    if oriented.mode.startswith("I") or oriented.mode == "F":
        return _scaled(oriented).convert("RGB")
    if oriented.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in oriented.info:
        rgba = oriented.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return oriented.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """16-bit and float samples as 8 bits: Pillow clips them at 255 on convert("L"); the range that is used is scaled instead.

    Tile by tile, because the arithmetic takes 32 bytes a sample: 3.2 GB for an image of 100 megapixels.
    """
    boxes = [
        (x, y, min(x + _TILE, image.width), min(y + _TILE, image.height))
        for y in range(0, image.height, _TILE)
        for x in range(0, image.width, _TILE)
    ]
    wide = any(_samples(image, box).max() > 255 for box in boxes)
    scale = 255.0 / (65535.0 if wide else 255.0)
    grey = Image.new("L", image.size)
    for box in boxes:
        tile = np.clip(_samples(image, box) * scale, 0, 255).astype(np.uint8)
        grey.paste(Image.fromarray(tile), box)
    return grey


def _samples(image: Image.Image, box: tuple[int, int, int, int]) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(image.crop(box), dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def examine(data: bytes, limits: Limits = Limits()) -> Examined:
    """Identity, full decode, perceptual hash (imagehash's 8x8 DCT hash) and a 32x32 luminance thumbnail of one image.

    Raises:
        Unreadable: as `decode`; also `too_long_a_side`, `too_many_decoded_bytes` and `too_many_frames`, by the header.
        MemoryError: says nothing about the image.
    """
    image, image_format = _decode(data, limits)
    grey = image.convert("L")
    # Both small images come from one reduction: a box-filtered copy at most 4x the target moves a hash by at most 2 bits (tested) and
    # saves two full-size Lanczos passes on photographs. A very long side is reduced further: Lanczos weights for a side of 10^8
    # pixels take 5 GB.
    shrink = max(1, min(grey.width, grey.height) // (4 * THUMBNAIL_SIDE))
    factors = (max(shrink, grey.width // _LONG_SIDE), max(shrink, grey.height // _LONG_SIDE))
    if factors != (1, 1):
        grey = grey.reduce(factors)
    thumbnail = grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    bits = imagehash.phash(thumbnail).hash
    return Examined(
        image_id=image_id(data),
        width=image.width,
        height=image.height,
        format=image_format,
        phash=int(np.packbits(bits.flatten()).view(">u8")[0]),
        thumbnail=thumbnail.tobytes(),
    )
