"""Images whose bytes say where they were taken are told apart from those that only have metadata."""

import numpy as np
import pytest
from builders import encoded
from image_bytes import plain, png_chunk
from located_images import PICTURE, XMP, exif

from lodeset.pipeline.algorithms.images.decoding import Limits, decoded, examine


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_gps_in_exif_is_seen(kind: str) -> None:
    assert examine(encoded(PICTURE, kind, exif=exif(place=True)), Limits()).located


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_without_a_place_is_none(kind: str) -> None:
    assert not examine(encoded(PICTURE, kind, exif=exif(place=False)), Limits()).located
    assert not examine(encoded(PICTURE, kind), Limits()).located


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_gps_in_xmp_is_seen(kind: str) -> None:
    for attribute in ('exif:GPSLatitude="48,12.5N"', "drone-dji:GpsLongtitude='16.4'"):
        assert examine(encoded(PICTURE, kind, xmp=XMP.format(attribute).encode()), Limits()).located
    for attribute in ('dc:title="no GPS"', 'exif:GPSLatitude=""'):
        assert not examine(encoded(PICTURE, kind, xmp=XMP.format(attribute).encode()), Limits()).located


def test_files_that_are_mended_keep_no_secret() -> None:
    data = encoded(PICTURE, "PNG", exif=exif(place=True))
    broken = data[:33] + png_chunk(b"iCCP", b"icc\0\0" + b"\xff" * 40) + data[33:]
    assert decoded(broken, Limits()).located
    assert decoded(encoded(PICTURE, "JPEG", exif=exif(place=True))[:-2], Limits()).located


def test_maps_say_where_they_are() -> None:
    samples = np.asarray(PICTURE.convert("L"), np.uint16) * 16
    for tag in ("tag_33922", "tag_34264", "tag_34853"):
        assert decoded(plain(samples, **{tag: 1.0}), Limits()).located
    assert not decoded(plain(samples), Limits()).located
