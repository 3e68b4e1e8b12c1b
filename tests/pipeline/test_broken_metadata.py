"""Pixels are what counts: odd metadata costs no image, and what lacks its end is read as far as it goes."""

import struct
import zlib

import numpy as np
import pytest
from builders import encoded, textured
from image_bytes import png_chunk, tiff
from PIL import Image

from lodeset.pipeline.algorithms.images.decoding import MOST_MISSING, Limits, Unreadable, decoded

LIMIT = Limits(10**6)
PICTURE = textured(5)
LONG = np.random.default_rng(0).bytes(3 * 2**20)


def with_app(jpeg: bytes, payload: bytes, marker: int = 0xE1) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def after_header(png: bytes, kind: bytes, body: bytes) -> bytes:
    return png[:33] + png_chunk(kind, body) + png[33:]


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + b"\0\0\0\0"


TURNED = (0x112, 3, 1, struct.pack("<HH", 6, 0))
# Values that Pillow cannot write back, and directories that lead nowhere.
ODD_EXIF = {
    "x resolution 1/0 as text": exif(TURNED, (0x11A, 2, 4, b"1/0\0")),
    "orientation twice": exif(TURNED, (0x112, 2, 4, b"six\0")),
    "a pointer beyond the end": exif(TURNED, (0x8769, 4, 1, struct.pack("<I", 10**6))),
    "a pointer to itself": exif(TURNED, (0x8769, 4, 1, struct.pack("<I", 8))),
    "a count of billions": exif(TURNED, (0x10F, 2, 2**32 - 1, struct.pack("<I", 8))),
    "an unknown type": exif(TURNED, (0x9286, 77, 3, b"\xff\xff\xff\xff")),
    "a negative height": exif(TURNED, (0x101, 9, 1, struct.pack("<i", -9))),
    "more entries than bytes": b"II*\0\x08\0\0\0\xff\xff" + exif(TURNED)[10:22],
}


@pytest.mark.parametrize("odd", ODD_EXIF.values(), ids=list(ODD_EXIF))
def test_odd_exif_turns_the_image_and_costs_nothing(odd: bytes) -> None:
    turned = PICTURE.transpose(Image.Transpose.ROTATE_270)
    whole = encoded(PICTURE, "JPEG", quality=90)
    files = (
        with_app(whole, b"Exif\0\0" + odd),
        after_header(encoded(PICTURE), b"eXIf", odd),
        encoded(PICTURE, "WEBP", lossless=True, exif=odd),
    )
    for data in files:
        shown = decoded(data, LIMIT)
        assert np.abs(np.asarray(shown.image).astype(int) - np.asarray(turned)).mean() < 5
        assert shown.truncated is None


def test_odd_tags_of_a_tiff_turn_it_and_cost_nothing() -> None:
    grey = np.asarray(PICTURE.convert("L"))
    tags: dict[int, tuple[int, ...] | bytes | float] = {258: (8,), 262: (1,), 277: (1,), 274: (6,), 282: b"72\0"}
    data = tiff(grey.tobytes(), PICTURE.size, {**tags, 296: 70_000.0})
    assert np.array_equal(np.asarray(decoded(data, LIMIT).image)[..., 0], np.rot90(grey, -1))


ODD_PNG = {
    "a profile of 3 MB": (b"iCCP", b"icc\0\0" + zlib.compress(LONG)),
    "a text of 3 MB": (b"zTXt", b"Comment\0\0" + zlib.compress(LONG)),
    "a broken profile": (b"iCCP", b"icc\0\0" + b"\xff" * 40),
    "broken XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + b"\xff" * 40),
    "an empty physical size": (b"pHYs", b""),
    "a short gamma": (b"gAMA", b"\1"),
    "an empty animation": (b"acTL", b""),
}


@pytest.mark.parametrize("odd", ODD_PNG.values(), ids=list(ODD_PNG))
def test_odd_chunks_cost_no_png(odd: tuple[bytes, bytes]) -> None:
    data = after_header(encoded(PICTURE), *odd)
    assert np.array_equal(np.asarray(decoded(data, LIMIT).image), np.asarray(PICTURE))


def test_transparency_outlives_odd_chunks() -> None:
    clear = Image.new("RGBA", (40, 30), (10, 20, 30, 0)).convert("P")
    data = after_header(encoded(clear, transparency=0), *ODD_PNG["a profile of 3 MB"])
    assert decoded(data, LIMIT).image.getextrema() == ((255, 255),) * 3


def test_a_chunk_with_a_wrong_checksum_costs_no_png() -> None:
    said = png_chunk(b"tEXt", b"Author\0somebody")
    data = encoded(PICTURE)
    data = data[:33] + said[:-1] + bytes([said[-1] ^ 1]) + data[33:]
    assert np.array_equal(np.asarray(decoded(data, LIMIT).image), np.asarray(PICTURE))


def test_odd_segments_cost_no_jpeg() -> None:
    whole = encoded(PICTURE, "JPEG", quality=90)
    expected = np.asarray(decoded(whole, LIMIT).image)
    profile = b"".join(b"ICC_PROFILE\0" + bytes([n, 255]) + LONG[:60_000] for n in (1,))
    for odd in (
        with_app(whole, profile, 0xE2),
        with_app(whole, b"MPF\0II*\0\xff\xff\xff\xff", 0xE2),
        with_app(whole, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta \xff<<", 0xE1),
        with_app(whole, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff", 0xED),
        with_app(whole, b"Adobe", 0xEE),
    ):
        assert np.array_equal(np.asarray(decoded(odd, LIMIT).image), expected)


@pytest.mark.parametrize("missing", [1, 2, 9])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_without_its_end_is_kept_and_says_so(missing: int, options: dict[str, object]) -> None:
    data = encoded(PICTURE, "JPEG", quality=92, **options)
    whole, cut = decoded(data, LIMIT), decoded(data[:-missing], LIMIT)
    assert whole.truncated is None
    assert cut.truncated is not None and cut.truncated <= MOST_MISSING
    differs = (np.asarray(whole.image) != np.asarray(cut.image)).any(axis=2).mean()
    assert differs <= cut.truncated + 0.01


@pytest.mark.parametrize(
    ("kind", "options", "missing"),
    [
        ("PNG", {}, (1, 12, 16, 60)),
        ("WEBP", {"quality": 80}, (1, 7, 20)),
        ("WEBP", {"lossless": True}, (1, 7)),
        ("BMP", {}, (1, 300)),
        ("TIFF", {}, (1, 300)),
        ("PPM", {}, (1, 300)),
    ],
)
def test_other_formats_without_their_end(kind: str, options: dict[str, object], missing: tuple[int, ...]) -> None:
    data = encoded(PICTURE, kind, **options)
    whole = np.asarray(decoded(data, LIMIT).image)
    for bytes_ in missing:
        cut = decoded(data[:-bytes_], LIMIT)
        assert cut.truncated is not None and cut.truncated <= MOST_MISSING
        assert (whole != np.asarray(cut.image)).any(axis=2).mean() <= cut.truncated + 0.01


def test_an_interlaced_png_without_its_end() -> None:
    height, width = 19, 21
    rows, expected = b"", np.zeros((height, width), np.uint8)
    level = iter(range(10**6))
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        for row in range(y, height, dy):
            line = [next(level) * 37 % 251 for _ in range(x, width, dx)]
            expected[row, x::dx] = line
            rows += b"\0" + bytes(line)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(rows, 0))
    assert decoded(data, LIMIT).truncated == 0.0
    cut = decoded(data[: -4 - 4 - 8], LIMIT)
    assert cut.truncated == pytest.approx(8 / (height * width), abs=0.005)
    assert (np.asarray(cut.image)[..., 0] != expected).sum() <= 8


@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_half_an_image_is_none(kind: str, share: float) -> None:
    data = encoded(PICTURE, kind)
    with pytest.raises(Unreadable, match="corrupt"):
        decoded(data[: int(len(data) * share)], LIMIT)


def test_a_progressive_jpeg_needs_its_last_scans() -> None:
    """Cut behind a scan, every pixel is told, and coarsely."""
    data = encoded(PICTURE, "JPEG", quality=92, progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    for at in scans[1:4]:
        with pytest.raises(Unreadable, match="corrupt"):
            decoded(data[:at], LIMIT)


def test_what_follows_the_end_is_no_missing_end() -> None:
    for kind in ("JPEG", "PNG"):
        data = encoded(PICTURE, kind) + b"\0\0\0\x18ftypmp42" + b"\0" * 400
        assert decoded(data, LIMIT).truncated is None
