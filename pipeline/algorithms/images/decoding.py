"""Encoded bytes -> identity, pixels and hashes.

*Pixels* mean the same everywhere in lodeset: the first frame, EXIF orientation applied, alpha composited over white,
CMYK, palette and gray converted to 8-bit RGB, wider samples scaled by the range that `algorithms.images.samples`
determines.

Metadata never make an image unreadable: an image that cannot be decoded with its profiles, texts and EXIF is decoded
without them. A truncated file is decoded as far as possible, and marked as truncated.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError
from scipy.fftpack import dct

from lodeset.pipeline.algorithms.images import containers, exif, formats
from lodeset.pipeline.algorithms.images.located import located, location_in
from lodeset.pipeline.algorithms.images.quality import detail_and_sharpness, encoding_quality
from lodeset.pipeline.algorithms.images.samples import Declared
from lodeset.pipeline.algorithms.images.wide import (
    coloured,
    declared,
    deepened,
    is_deep,
    is_wide,
    scaled,
    tiff_kind,
    tiff_pixel_bytes,
    tiff_tags,
    unknown_tiff,
)

ID_HEX_DIGITS = 32
THUMBNAIL_SIDE = 32
_LONG_SIDE = 8_192

# Codecs that Pillow runs in its own process and that images on the web use. Formats that start other programs (EPS),
# parse scripts or fonts, or have no stated size (WMF) are left out. Pillow opens MPO stacks as JPEG; their first frame
# counts.
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
    formats.HEIF: "heic",
    formats.JXL: "jxl",
}

# Bytes with these signatures that cannot be opened are broken images.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*", b"\x00\x00\x00\x0cjP  ")
_WIDTH, _HEIGHT = 256, 257
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Maximum missing share of the pixels of a truncated file; above it, the image counts as broken.
MOST_MISSING = 0.05

# lodeset itself checks limits against the header before any pixel is decoded (see `decode`).
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False


class Unreadable(Exception):
    """These bytes are not an image that can be decoded safely; `reason` is a column value of the `rejects` table."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # all arguments, so that the error can be pickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Decoded:
    """RGB pixels, and how they were decoded.

    Attributes:
        sample_range: the samples that became black and white; None if samples have 8 bits.
        truncated: the missing share of the pixels of a truncated file; None for a complete file.
        quality: quality of the encoding, 0 to 100.
        located: whether the bytes contain a location.
    """

    image: Image.Image
    format: str
    quality: float
    located: bool = False
    sample_range: str | None = None
    truncated: float | None = None


@dataclass(frozen=True)
class Examined:
    """What ingest records about one image."""

    image_id: str
    width: int
    height: int
    format: str
    phash: int
    thumbnail: bytes
    sample_range: str | None
    truncated: float | None
    located: bool
    detail: float
    sharpness: float
    quality: float


@dataclass(frozen=True)
class Limits:
    """Limits that an image's header must respect before any pixel is decoded. Each one is a setting of `ingest`."""

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
            Unreadable: `empty`, `not_an_image`, `unsupported_format`, `corrupt`, or `too_many_pixels` (from the header,
            before decoding).
            MemoryError: there is too little memory; not the image's fault.
    """
    limits = Limits(max_pixels, max_side=max_pixels, max_decoded_mb=math.inf, max_frames=sys.maxsize)
    return decoded(data, limits).image


def decoded(data: bytes, limits: Limits) -> Decoded:
    """As `decode`, with further information about the pixels."""
    if not data:
        raise Unreadable("empty", "0 bytes")
    with warnings.catch_warnings():
        # A codec's warning about odd metadata is no reason to reject an image that can be decoded.
        warnings.simplefilter("ignore")
        try:
            result = _read(data, limits)
        except Unreadable as error:
            if error.reason != "corrupt":
                raise
            mended = _mended(data, limits)
            if mended is None:
                raise
            return mended
    if containers.lacks_end(data, result.format):
        return replace(result, truncated=0.0)
    return result


def _mended(data: bytes, limits: Limits) -> Decoded | None:
    """Decode an image that cannot be decoded as it is: without its metadata, or without its end."""
    bare = containers.without_metadata(data) or data
    turn = exif.orientation_in(data)
    if bare != data:
        try:
            result = replace(_read(bare, limits, turn), located=location_in(data))
            return replace(result, truncated=0.0) if containers.lacks_end(data, result.format) else result
        except Unreadable:
            pass
    ended = containers.completed(bare, limits.max_pixels)
    if ended is None:
        return None
    try:
        result = replace(_read(ended.data, limits, turn), located=location_in(data))
        missing = ended.missing
        if missing is None:
            other = _read(ended.other, limits, turn)
            missing = float((np.asarray(result.image) != np.asarray(other.image)).any(axis=2).mean())
    except Unreadable:
        return None
    return replace(result, truncated=missing) if missing <= MOST_MISSING else None


def _read(data: bytes, limits: Limits, turn: int | None = None) -> Decoded:
    """One attempt; `turn` is the EXIF orientation if the data have lost theirs."""
    optional = formats.optional_format(data)
    if optional is not None and optional.name not in formats.installed():
        way_out = f"{optional.told}: `pip install 'lodeset[formats]'` brings its decoder"
        raise Unreadable("unsupported_format", way_out)
    if optional is not None and optional.name == formats.JXL:
        return _read_jxl(data, limits)
    kind = f"{optional.told}: " if optional is not None else ""
    try:
        if optional is not None:
            formats.register_heif()
        opened = Image.open(io.BytesIO(data), formats=(*FORMATS, optional.name) if optional else FORMATS)
    except UnidentifiedImageError:
        if data.startswith(_TIFF) and (from_tiff := _unknown_tiff(data, limits)) is not None:
            return from_tiff
        if optional is not None:
            raise Unreadable("corrupt", f"{optional.told} that its decoder cannot open") from None
        unread = formats.unread(data)
        if unread is not None:
            raise Unreadable(
                "unsupported_format", f"{unread}: convert it to PNG, TIFF or another format that is read"
            ) from None
        if data.startswith(_SIGNATURES):
            like = f"{len(data):,} bytes that start like an image ({data[:8].hex(' ')}) but cannot be read as one"
            raise Unreadable("corrupt", like) from None
        raise Unreadable("not_an_image", formats.described(data)) from None
    except MemoryError:
        raise
    except Exception as error:
        # Codecs raise arbitrary errors (struct.error, SyntaxError, OverflowError, ...) on crafted bytes.
        raise Unreadable("corrupt", kind + _short(error)) from error
    with _named(kind):
        _check_header(opened, limits)
    try:
        wide = is_wide(opened)
        deep = not wide and is_deep(opened, data)
        declaration = declared(opened, data) if wide or deep else None
        loaded, turn = _loaded(opened, turn)
        used = None
        if declaration is not None:
            loaded, used = scaled(loaded, declaration) if wide else deepened(loaded, data, declaration)
        tags = opened.tag_v2 if isinstance(opened, TiffImagePlugin.TiffImageFile) else None
        told_of = (encoding_quality(opened, data), located(opened.info, tags), used)
        return Decoded(exif.upright(_to_rgb(loaded), turn), opened.format or "", *told_of)
    except MemoryError:
        raise
    except Exception as error:
        raise Unreadable("corrupt", kind + _short(error)) from error


@contextlib.contextmanager
def _named(kind: str) -> Iterator[None]:
    """Prefix errors about an image with its format: its first bytes may be all that belongs to that format."""
    try:
        yield
    except Unreadable as error:
        raise Unreadable(error.reason, f"{kind}{error.detail}") from error


def _read_jxl(data: bytes, limits: Limits) -> Decoded:
    try:
        size = formats.jxl_size(data)
        with _named("JPEG XL: "):
            _check_size(*size, "RGBA", 4, limits)
        planes = formats.jxl_planes(data)
        alpha = planes.shape[2] in (2, 4)
        if planes.dtype == np.uint8:
            image, used = Image.fromarray(planes.squeeze(axis=2) if planes.shape[2] == 1 else planes), None
        else:
            image, used = coloured(planes, Declared(), alpha)
    except (MemoryError, Unreadable):
        raise
    except Exception as error:
        raise Unreadable("corrupt", f"JPEG XL: {_short(error)}") from error
    return Decoded(_to_rgb(image), formats.JXL, encoding_quality(image, data), location_in(data), used)


def _unknown_tiff(data: bytes, limits: Limits) -> Decoded | None:
    """A TIFF with a kind of pixels that Pillow does not know.

    Raises:
        Unreadable: OpenCV does not know it, either.
    """
    try:
        tags = tiff_tags(data)
        size, kind = (int(tags[_WIDTH]), int(tags[_HEIGHT])), tiff_kind(tags)
    except Exception:
        return None
    _check_size(*size, kind, tiff_pixel_bytes(tags), limits)
    from_opencv = unknown_tiff(data, tags, size)
    if from_opencv is None:
        raise Unreadable(
            "unsupported_format", f"a TIFF of {kind} samples per pixel: neither Pillow nor OpenCV reads it"
        )
    image, used = from_opencv
    return Decoded(exif.upright(_to_rgb(image), exif.tiff_orientation(tags)), "TIFF", 100.0, located({}, tags), used)


def _check_header(image: Image.Image, limits: Limits) -> None:
    """Refuse an image whose header exceeds the limits."""
    _check_size(*image.size, image.mode, len(image.getbands()) * _SAMPLE_BYTES.get(image.mode, 1), limits)
    frames = _frames(image)
    if frames > limits.max_frames:
        raise Unreadable("too_many_frames", f"{frames:,} frames, and ingest.max_frames is {limits.max_frames:,}")


def _check_size(width: int, height: int, kind: str, pixel_bytes: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise Unreadable("corrupt", f"size {width} x {height}")
    if width * height > limits.max_pixels:
        detail = f"{width} x {height} = {width * height:,} pixels, and ingest.max_pixels is {limits.max_pixels:,}"
        raise Unreadable("too_many_pixels", detail)
    if max(width, height) > limits.max_side:
        raise Unreadable("too_long_a_side", f"{width} x {height}, and ingest.max_side is {limits.max_side:,}")
    decoded_mb = width * height * pixel_bytes / 2**20
    if decoded_mb > limits.max_decoded_mb:
        detail = (
            f"{width} x {height} {kind} = {decoded_mb:,.0f} MiB, and ingest.max_decoded_mb is {limits.max_decoded_mb:g}"
        )
        raise Unreadable("too_many_decoded_bytes", detail)


# Bytes per sample, unless 1.
_SAMPLE_BYTES = {"I": 4, "F": 4, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}


def _frames(image: Image.Image) -> int:
    """Number of frames in the header. Not determined for other formats: Pillow would read a whole GIF or TIFF to count
    them, and only the first frame is decoded.
    """
    return int(getattr(image, "n_frames", 1)) if image.format in ("WEBP", "PNG", "AVIF") else 1


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _loaded(opened: ImageFile.ImageFile, turn: int | None) -> tuple[Image.Image, int | None]:
    """The stored pixels and the orientation, unless that is known."""
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        # Pillow would rotate the image after loading and rewrite its tags, which fails on odd ones.
        opened.load_end = lambda: None  # type: ignore[method-assign]
        opened.load()
        return opened._new(opened.im), turn or exif.tiff_orientation(opened.tag_v2)
    opened.load()
    if turn is None and isinstance(opened.info.get("exif"), bytes):
        turn = exif.orientation(opened.info["exif"])
    return opened, turn


# -- other modes


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def examine(data: bytes, limits: Limits = Limits()) -> Examined:
    """Identity, full decode, perceptual hash (imagehash's 8x8 DCT hash) and a 32x32 luminance thumbnail of one image.

    Raises:
        Unreadable: as `decode`; also `too_long_a_side`, `too_many_decoded_bytes` and `too_many_frames`, from the
        header.
        MemoryError: there is too little memory; not the image's fault.
    """
    pixels = decoded(data, limits)
    image = pixels.image
    grey = image.convert("L")
    detail, sharpness = detail_and_sharpness(grey)
    # Both small images come from one reduction: a box-filtered copy of at most 4x the target changes a hash by at most
    # 2 bits (tested) and saves two full-size Lanczos passes on photographs. A very long side is reduced further,
    # because Lanczos weights for a side of 10^8 pixels take 5 GB.
    shrink = max(1, min(grey.width, grey.height) // (4 * THUMBNAIL_SIDE))
    factors = (max(shrink, grey.width // _LONG_SIDE), max(shrink, grey.height // _LONG_SIDE))
    if factors != (1, 1):
        grey = grey.reduce(factors)
    thumbnail = grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS).tobytes()
    return Examined(
        image_id=image_id(data),
        width=image.width,
        height=image.height,
        format=pixels.format,
        phash=_phash(thumbnail),
        thumbnail=thumbnail,
        sample_range=pixels.sample_range,
        truncated=pixels.truncated,
        located=pixels.located,
        detail=detail,
        sharpness=sharpness,
        quality=pixels.quality,
    )


def _phash(thumbnail: bytes) -> int:
    """imagehash's 8x8 DCT hash, bit for bit (tested), in less than half the time."""
    levels = np.frombuffer(thumbnail, np.uint8).reshape(THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    low = dct(dct(levels, axis=0)[:8], axis=1)[:, :8].ravel()
    middle = np.partition(low, (31, 32))[31:33].mean()
    return int(np.packbits(low > middle).view(">u8")[0])
