"""HEIC and JPEG XL: read where their decoders are, named with the way out where they are not."""

import io

import numpy as np
import pytest
from builders import textured
from PIL import Image

from lodeset.pipeline.algorithms.images import formats
from lodeset.pipeline.algorithms.images.decoding import EXTENSIONS, Limits, Unreadable, decoded

PICTURE = textured(5)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
AVIF_IN_HEIF = b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(64)
JXL_STREAM = b"\xff\x0a" + bytes(64)
JXL_BOX = b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl " + bytes(64)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"qoif" + bytes(90), "QOI"),
        (b"\x76\x2f\x31\x01" + bytes(90), "OpenEXR"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(90), "CR2"),
        (b"P7\nWIDTH 1\n", "PAM"),
    ],
)
def test_pictures_that_are_not_read_are_named(data: bytes, told: str) -> None:
    with pytest.raises(Unreadable) as refused:
        decoded(data, Limits())
    assert refused.value.reason == "unsupported_format" and told in refused.value.detail


@pytest.mark.parametrize(
    ("data", "name"),
    [(HEIC, "HEIC"), (AVIF_IN_HEIF, "AVIF in HEIF"), (JXL_STREAM, "JPEG XL"), (JXL_BOX, "JPEG XL")],
)
def test_what_needs_a_decoder_is_named_with_the_way_out(
    data: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "installed", lambda: ())
    with pytest.raises(Unreadable, match=rf"{name}.*lodeset\[formats\]") as caught:
        decoded(data, Limits())
    assert caught.value.reason == "unsupported_format"


def test_others_need_none() -> None:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "AVIF")
    assert decoded(buffer.getvalue(), Limits()).format == "AVIF"
    for data in (b"\0\0\0\x18ftypmp42" + bytes(99), b"plain text that says ftyp", b"\xff\xd8\xff"):
        assert formats.optional_format(data) is None


def heic(image: Image.Image, **options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install 'lodeset[formats]'")
    pillow_heif.register_heif_opener()
    buffer = io.BytesIO()
    image.save(buffer, "HEIF", **options)
    return buffer.getvalue()


def jxl(samples: np.ndarray, **options: object) -> bytes:
    codecs = pytest.importorskip("imagecodecs", reason="pip install 'lodeset[formats]'")
    return bytes(codecs.jpegxl_encode(samples, **options))


def test_heic_is_read_and_turned_once() -> None:
    found = decoded(heic(PICTURE, quality=95), Limits())
    assert (found.format, EXTENSIONS[found.format]) == ("HEIF", "heic")
    assert np.abs(np.asarray(found.image).astype(int) - np.asarray(PICTURE)).mean() < 3
    exif = Image.Exif()
    exif[274] = 6
    turned = decoded(heic(PICTURE, quality=95, exif=exif.tobytes()), Limits()).image
    upright = PICTURE.transpose(Image.Transpose.ROTATE_270)
    assert np.abs(np.asarray(turned).astype(int) - np.asarray(upright)).mean() < 3


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (48, 40), (160, 128), (300, 7), (1_000, 520), (640, 480)])
def test_jxl_is_read_and_its_size_known_before(size: tuple[int, int]) -> None:
    samples = np.asarray(PICTURE.resize(size))
    data = jxl(samples, lossless=True)
    assert formats.jxl_size(data) == size
    found = decoded(data, Limits())
    assert found.format == "JXL" and np.array_equal(np.asarray(found.image), samples)


def test_other_kinds_of_jxl() -> None:
    grey = np.asarray(PICTURE.convert("L"))
    for samples in (grey, grey.astype(np.uint16) * 257, grey.astype(np.float32) / 255):
        shown = np.asarray(decoded(jxl(samples, lossless=True), Limits()).image)
        assert np.abs(shown[..., 0].astype(int) - grey).max() <= 2
    clear = np.dstack([np.asarray(PICTURE), np.zeros_like(grey)])
    assert decoded(jxl(clear, lossless=True), Limits()).image.getextrema() == ((255, 255),) * 3
    boxed = jxl(np.asarray(PICTURE), usecontainer=True)
    assert formats.jxl_size(boxed) == PICTURE.size and decoded(boxed, Limits()).image.size == PICTURE.size


def test_limits_hold_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jxl(np.asarray(PICTURE))
    photo = heic(PICTURE)
    monkeypatch.setattr(formats, "jxl_planes", lambda _: pytest.fail("decoded"))
    for one in (data, photo):
        with pytest.raises(Unreadable, match="too_many_pixels"):
            decoded(one, Limits(max_pixels=1_000))


def test_broken_ones_are_named_whatever_their_header_says() -> None:
    """Of bytes that only begin as JPEG XL, the header is chance: it may promise any size."""
    pytest.importorskip("imagecodecs", reason="pip install 'lodeset[formats]'")
    chance = np.random.default_rng(0)
    for _ in range(200):
        with pytest.raises(Unreadable, match="JPEG XL"):
            decoded(b"\xff\x0a" + chance.bytes(800), Limits())


def test_broken_ones_are_corrupt_by_name() -> None:
    noise = np.random.default_rng(0).bytes(400)
    for data in (heic(PICTURE)[:300], HEIC + noise, jxl(np.asarray(PICTURE))[:60], JXL_STREAM + noise, JXL_BOX + noise):
        with pytest.raises(Unreadable, match=r"HEIC|JPEG XL") as caught:
            decoded(data, Limits())
        assert caught.value.reason in ("corrupt", "too_many_pixels")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
        (b"\xef\xbb\xbf\n<!DOCTYPE HTML><html>", "a web page"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"\0\0\0\x20ftypisom" + bytes(40), "MP4's container"),
        (b"file,label\n1,2", "14 bytes that start with 'file,lab'"),
        (b"\x01\x02\x03", "3 bytes that start with 01 02 03"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, told: str) -> None:
    with pytest.raises(Unreadable) as refused:
        decoded(data, Limits())
    assert refused.value.reason == "not_an_image" and told in refused.value.detail
