"""Wide samples against the 8-bit picture that they were made of."""

import cv2
import numpy as np
import pytest
from builders import encoded, textured
from image_bytes import plain, png16, tiff
from PIL import Image

from lodeset.pipeline.algorithms.images.decoding import Limits, Unreadable, decoded
from lodeset.pipeline.algorithms.images.samples import Declared, range_of

LIMIT = Limits(10**6)
COLOUR = np.asarray(textured(3, 48, 40))
GREY = np.asarray(textured(3, 48, 40).convert("L"))


def like(data: bytes, picture: np.ndarray, within: float = 2.0) -> str:
    """That `data` shows the picture; what is told of the range."""
    found = decoded(data, LIMIT)
    shown = np.asarray(found.image).astype(float)
    expected = np.broadcast_to(picture[..., None] if picture.ndim == 2 else picture, shown.shape)
    assert np.abs(shown - expected).mean() < within, found.sample_range
    return found.sample_range or ""


@pytest.mark.parametrize(("bits", "told"), [(10, "1023"), (12, "4095"), (14, "16383"), (16, "65535")])
def test_few_bits_in_16(bits: int, told: str) -> None:
    stretched = np.round(GREY / 255 * (2**bits - 1)).astype(np.uint16)
    colours = np.round(COLOUR / 255 * (2**bits - 1)).astype(np.uint16)
    for data, picture in (
        (png16(stretched, 0), GREY),
        (plain(stretched), GREY),
        (png16(colours, 2), COLOUR),
        (cv2.imencode(".tiff", colours[..., ::-1])[1].tobytes(), COLOUR),
        (b"P5 48 40 65535\n" + stretched.astype(">u2").tobytes(), GREY),
        (b"P6 48 40 65535\n" + colours.astype(">u2").tobytes(), COLOUR),
    ):
        assert told in like(data, picture)


def test_alpha_of_few_bits_is_opaque_where_it_is_full() -> None:
    colours = np.round(COLOUR / 255 * 4095).astype(np.uint16)
    opaque = np.full((*GREY.shape, 1), 4095, np.uint16)
    like(png16(np.dstack([colours, opaque]), 6), COLOUR)
    half_white = (COLOUR.astype(float) + 255) / 2
    like(png16(np.dstack([colours, opaque // 2]), 6), half_white)
    grey = np.round(GREY / 255 * 1023).astype(np.uint16)[..., None]
    like(png16(np.dstack([grey, np.full_like(grey, 1023)]), 4), GREY)


def test_a_declared_range_stands_where_the_samples_lie_in_it() -> None:
    dark = GREY // 8  # a dark picture stays one where the file says what white is
    ten = (dark.astype(np.uint16) * 4, dark)
    assert "sBIT" in like(png16(ten[0], 0, b"\x0a"), dark)
    assert "SMaxSampleValue" in like(plain(ten[0], tag_340=(0,), tag_341=(1020,)), dark)
    assert "MaxSampleValue" in like(plain(ten[0], tag_281=(1020,)), dark)
    assert "SMinSampleValue" in like(plain(GREY.astype(np.float32) + 100, tag_340=100.0, tag_341=355.0), GREY)
    # One that the samples leave, or that only repeats their type, says nothing.
    assert "own" in like(plain(GREY.astype(np.uint16) * 16, tag_341=(255,)), GREY)
    assert "own" in like(plain(GREY.astype(np.uint16) * 16, tag_280=(0,), tag_281=(65535,)), GREY)
    # What follows the PNG specification is scaled up to 16 bits, whatever sBIT says.
    assert "type" in like(png16(GREY.astype(np.uint16) * 257, 0, b"\x0a"), GREY)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_floats(kind: type) -> None:
    unit = GREY.astype(kind) / 255
    assert "0 to 1 " in like(plain(unit), GREY)
    assert "0 to 255 " in like(plain(GREY.astype(kind)), GREY)
    low, high = int(GREY.min()), int(GREY.max())
    full = (GREY.astype(float) - low) * 255 / (high - low)
    assert "own" in like(plain(unit * 2 - 1), full)  # as networks like them
    assert "own" in like(plain(GREY.astype(kind) * 3 - 400), full)
    colours = np.ascontiguousarray(COLOUR[..., ::-1].astype(kind) / 255)
    assert "0 to 1 " in like(cv2.imencode(".tiff", colours)[1].tobytes(), COLOUR)


def test_integers_of_other_widths() -> None:
    low, high = int(GREY.min()), int(GREY.max())
    full = (GREY.astype(float) - low) * 255 / (high - low)
    hounsfield = GREY.astype(np.int16) * 12 - 1024
    assert f"{low * 12 - 1024} to" in like(plain(hounsfield), full)
    assert "own" in like(plain(GREY.astype(np.int32) * 1000 - 70_000), full)
    assert "own" in like(plain((GREY.astype(np.int16) - 128).astype(np.int8)), full)
    large = GREY.astype(np.uint32) << 24  # beyond what 32 signed bits hold
    assert "4.29497e+09" in like(plain(large), GREY)
    assert "own" in like(plain(GREY.astype(np.uint32) * 16), GREY)


def test_white_is_zero() -> None:
    for samples in (GREY.astype(np.uint16) * 16, GREY.astype(np.float32) / 255, GREY.astype(np.uint32) * 2**16):
        like(plain(samples, tag_262=(0,)), 255 - GREY)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_samples(bits: int) -> None:
    """Samples that share bytes, as cameras write them."""
    stretched = np.round(GREY / 255 * (2**bits - 1)).astype(int)
    strip = np.packbits(np.array([[int(b) for b in f"{v:0{bits}b}"] for v in stretched.ravel()], np.uint8)).tobytes()
    data = tiff(strip, (48, 40), {258: (bits,), 262: (1,), 277: (1,), 339: (1,)})
    assert f"BitsPerSample: {bits}" in like(data, GREY)


def test_a_few_outliers_make_no_image_black() -> None:
    twelve = GREY.astype(np.uint16) * 16
    twelve[7, 7] = 65535  # a hot pixel
    like(plain(twelve), GREY)
    heights = GREY.astype(np.float32) / 255
    heights[:4, :10] = -9999.0
    like(plain(heights, tag_42113=b"-9999\0"), np.where(heights < 0, 0, GREY))
    heights[:4, :10] = -3.4e38
    like(plain(heights), np.where(heights < 0, 0, GREY))
    like(plain(np.where(heights < 0, np.nan, heights).astype(np.float32)), np.where(heights < 0, 0, GREY))


def test_frames_marks_and_hot_pixels_make_no_image_black() -> None:
    """They are drawn in the highest value of the type, by programs that know nothing of the bits that are used."""
    grey, colours = GREY.astype(np.uint16) * 16, COLOUR.astype(np.uint16) * 16
    hot, framed = np.zeros(GREY.shape, bool), np.zeros(GREY.shape, bool)
    hot[5, 9] = framed[:2] = framed[:, -3:] = True
    for drawn in (hot, framed):
        one, three = np.where(drawn, 65535, grey), np.where(drawn[..., None], 65535, colours)
        for data in (png16(one, 0), plain(one), b"P5 48 40 65535\n" + one.astype(">u2").tobytes()):
            assert "4095" in like(data, np.where(drawn, 255, GREY))
        for data in (png16(three, 2), cv2.imencode(".tiff", three[..., ::-1])[1].tobytes()):
            assert "4095" in like(data, np.where(drawn[..., None], 255, COLOUR))
    night = np.where(GREY > 250, 65535, GREY.astype(np.uint16) * 200)  # as bright as the type allows: stays as it is
    assert "65535" in like(plain(night), night / 257)


def test_a_value_far_below_all_others_means_no_data() -> None:
    for none, kind in ((-9999, np.float32), (-32768, np.int16), (-1e6, np.float64)):
        heights = GREY.astype(kind)
        heights[:30, 5:] = none
        like(plain(heights), np.where(heights < 0, 0, GREY))
    below_sea = GREY.astype(np.float32) - 100  # heights themselves may be negative
    like(plain(below_sea), (below_sea - below_sea.min()) * 255 / np.ptp(below_sea))


def test_a_fourth_channel_that_is_no_opacity_is_left_out() -> None:
    for bits in (8, 12):
        infrared = np.round(GREY[..., None] / 255 * (2**bits - 1) / 3)
        samples = np.dstack([np.round(COLOUR / 255 * (2**bits - 1)), infrared]).astype(np.uint16)
        tags = {258: (16,) * 4, 262: (2,), 277: (4,), 338: (0,), 339: (1,) * 4}
        like(tiff(samples.tobytes(), GREY.shape[::-1], tags), COLOUR)


def test_very_few_bits_are_seen_too() -> None:
    for bits in (1, 4):
        few = np.round(GREY / 255 * (2**bits - 1)).astype(np.uint16)
        assert f"0 to {2**bits - 1} " in like(plain(few), few.astype(float) * 255 / (2**bits - 1))
    assert "own" in like(
        plain(GREY.astype(np.float32) / 25_500),
        np.clip(GREY.astype(float) * 255 / np.percentile(GREY, 99.9), 0, 255),
        within=4,
    )


def test_samples_that_are_all_alike_or_no_numbers() -> None:
    for samples in (np.zeros((4, 4), np.float32), np.full((4, 4), np.nan, np.float32), np.full((4, 4), -5, np.int16)):
        assert decoded(plain(samples), LIMIT).image.getextrema() == ((0, 0),) * 3
    assert range_of([], 0, np.dtype(np.float32), Declared()).high > 0


def test_eight_bits_stay_as_they_are() -> None:
    dark = (COLOUR // 20).astype(np.uint8)
    found = decoded(encoded(dark), LIMIT)
    assert found.sample_range is None
    assert np.array_equal(np.asarray(found.image), dark)


def test_a_kind_that_nobody_reads_is_named() -> None:
    halves = plain(GREY.astype(np.float16))
    with pytest.raises(Unreadable, match="1 x 16-bit float") as caught:
        decoded(halves, LIMIT)
    assert caught.value.reason == "unsupported_format"


def test_the_size_of_an_unknown_kind_is_checked_before_it_is_read() -> None:
    with pytest.raises(Unreadable, match="too_many_pixels"):
        decoded(tiff(b"\0" * 64, (60_000, 60_000), {258: (64,), 262: (1,), 277: (1,), 339: (3,)}), LIMIT)


def test_orientation_of_wide_samples() -> None:
    data = plain(GREY.astype(np.float64) / 255, tag_274=(6,))
    assert decoded(data, LIMIT).image.size == (40, 48)
    like(data, np.rot90(GREY, -1))
    like(plain(GREY.astype(np.uint16) * 16, tag_274=(3,)), np.rot90(GREY, 2))


def test_wide_images_are_pil_images_of_rgb() -> None:
    assert isinstance(decoded(plain(GREY.astype(np.uint16) * 16), LIMIT).image, Image.Image)
    assert decoded(plain(GREY.astype(np.uint16) * 16), LIMIT).image.mode == "RGB"
