import io
import struct
import tracemalloc
import zlib

import imagehash
import numpy as np
import pytest
from builders import encoded, id_of, picture, pixels
from PIL import Image

from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode, examine, image_id

LIMIT = 10**6


def test_identity_is_the_start_of_sha256() -> None:
    data = picture(1)
    assert image_id(data) == id_of(data)
    assert examine(data).image_id == id_of(data)


def test_hash_is_that_of_imagehash_for_small_images() -> None:
    for seed in range(20):
        image = Image.fromarray(pixels(seed, width=100, height=70))
        expected = int(str(imagehash.phash(image)), 16)
        assert examine(encoded(image)).phash == expected


def test_hash_of_a_large_image_is_near_that_of_imagehash() -> None:
    for seed in range(5):
        image = Image.fromarray(pixels(seed, width=1200, height=900))
        expected = int(str(imagehash.phash(image)), 16)
        assert (examine(encoded(image)).phash ^ expected).bit_count() <= 2


def test_orientation_is_applied() -> None:
    upright = pixels(3)
    exif = Image.Exif()
    exif[274] = 6  # stored a quarter turn counter-clockwise
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    turned = decode(encoded(stored, "PNG", exif=exif), LIMIT)
    assert np.array_equal(np.asarray(turned), upright)


def test_alpha_lies_over_white() -> None:
    image = Image.new("RGBA", (20, 20), (10, 20, 30, 0))
    assert np.asarray(decode(encoded(image), LIMIT)).min() == 255


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(pixels(4)).convert("L") if mode == "I;16" else Image.fromarray(pixels(4)).convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 257)
    decoded = decode(encoded(image), LIMIT)
    assert decoded.mode == "RGB"
    grey = np.asarray(Image.fromarray(pixels(4)).convert("L"), dtype=float)
    if mode in ("L", "LA", "I;16"):
        assert np.abs(np.asarray(decoded.convert("L"), dtype=float) - grey).max() <= 1


def test_cmyk_jpeg_and_first_frame_of_an_animation() -> None:
    cmyk = Image.fromarray(pixels(5)).convert("CMYK")
    assert decode(encoded(cmyk, "JPEG", quality=95), LIMIT).mode == "RGB"
    frames = [Image.fromarray(pixels(s)).convert("P") for s in (6, 7)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    first = np.asarray(decode(buffer.getvalue(), LIMIT), dtype=float)
    assert np.abs(first - np.asarray(frames[0].convert("RGB"), dtype=float)).mean() < 2


def _bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not_an_image"),
        (b"<html>" * 100, "not_an_image"),
        (_bomb(50_000, 50_000), "too_many_pixels"),
        (encoded(pixels(8), "JPEG")[:400], "corrupt"),
        (picture(9)[:-200], "corrupt"),
        (b"\xff\xd8\xff\xe0broken", "corrupt"),
    ],
)
def test_bad_bytes_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable) as caught:
        decode(data, LIMIT)
    assert caught.value.reason == reason
    assert caught.value.detail


def test_pixel_limit_counts_the_header() -> None:
    data = picture(1, width=100, height=100)
    assert decode(data, 10_000).size == (100, 100)
    with pytest.raises(Unreadable, match=r"10,000 pixels, and ingest\.max_pixels is 9,999"):
        decode(data, 9_999)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_the_range_of_wide_samples_is_that_of_the_whole_image(kind: type) -> None:
    """All bright samples lie in the last of several tiles."""
    samples = np.random.default_rng(0).integers(0, 200, (1_100, 1_300)).astype(kind)
    samples[-40:, -200:] = 60_000
    if kind is np.float32:
        samples[0, :3] = (np.nan, np.inf, -np.inf)
    shown = np.asarray(decode(encoded(Image.fromarray(samples), "TIFF"), 10**7))[..., 0]
    expected = np.nan_to_num(samples.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) * 255 / 65535
    assert np.array_equal(shown, expected.astype(np.uint8))


def test_wide_samples_take_a_few_bytes_a_pixel() -> None:
    """Pillow's own memory (10 bytes a pixel here) is not traced; arithmetic on the whole image took 32."""
    data = encoded(Image.fromarray(np.zeros((3_000, 4_000), np.uint16)), "TIFF", compression="tiff_deflate")
    tracemalloc.start()
    try:
        decode(data, 10**8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * 3_000 * 4_000
