"""Places leave the bytes; the pixels, all other metadata and the length of most files stay."""

import io
from pathlib import Path

import numpy as np
import pytest
from builders import encoded, id_of, write_folder
from image_bytes import plain, png_chunk
from located_images import PICTURE, XMP, exif
from PIL import Image
from whole import pieces

from lodeset.pipeline.algorithms.images.decoding import Limits, decode, examine
from lodeset.pipeline.algorithms.images.located import location_in
from lodeset.pipeline.algorithms.images.stripping import without_location
from lodeset.pipeline.config import Ingest
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.stages.ingest.run import ingest_slice

FILES = {
    "JPEG": encoded(PICTURE, "JPEG", exif=exif(place=True)),
    "JPEG with XMP": encoded(PICTURE, "JPEG", xmp=XMP.format('exif:GPSLatitude="48,12.5N"').encode()),
    "JPEG that goes on": encoded(PICTURE, "JPEG", exif=exif(place=True))
    + encoded(PICTURE, "JPEG", exif=exif(place=True)),
    "MPO": encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE], exif=exif(place=True)),
    "PNG": encoded(PICTURE, "PNG", exif=exif(place=True)),
    "WEBP": encoded(PICTURE, "WEBP", exif=exif(place=True)),
    "WEBP with XMP": encoded(PICTURE, "WEBP", xmp=XMP.format("drone-dji:GpsLongtitude='16.4'").encode()),
    "AVIF": encoded(PICTURE, "AVIF", exif=exif(place=True)),
    "TIFF": plain(np.asarray(PICTURE.convert("L"), np.uint16) * 200, tag_33922=1.0, tag_34853=1.0),
}


@pytest.mark.parametrize("data", FILES.values(), ids=list(FILES))
def test_places_go_and_pixels_stay(data: bytes) -> None:
    clean = without_location(data)
    before, after = examine(data, Limits()), examine(clean, Limits())
    assert before.located and not after.located and not location_in(clean)
    assert len(clean) == len(data)
    assert before.thumbnail == after.thumbnail and (before.width, before.format) == (after.width, after.format)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(decode(clean)))
    assert without_location(clean) == clean


def test_other_tags_stay() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        told = exif(place=True)
        told[0x0112] = 6
        clean = without_location(encoded(PICTURE, kind, exif=told))
        kept = Image.open(io.BytesIO(clean)).getexif()
        assert (kept[0x010F], kept[0x0112]) == ("a camera", 6) and 0x8825 not in kept
        assert examine(clean, Limits()).width == PICTURE.height


def test_text_chunks_that_say_a_place_go_and_others_stay() -> None:
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.format('exif:GPSLatitude="48,12.5N"').encode()
    data = encoded(PICTURE)
    data = data[:33] + png_chunk(b"iTXt", xmp) + png_chunk(b"tEXt", b"Author\0somebody") + data[33:] + b"trailing"
    clean = without_location(data)
    assert b"GPS" not in clean and b"somebody" in clean and clean.endswith(b"trailing")
    assert np.array_equal(np.asarray(decode(data)), np.asarray(decode(clean)))


def test_what_says_no_place_is_the_same_bytes() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP"):
        data = encoded(PICTURE, kind)
        assert without_location(data) == data
    for noise in (
        b"",
        b"II*\0",
        b"\x89PNG\r\n\x1a\n\xff\xff",
        b"MM\0*\xff\xff\xff\xff",
        np.random.default_rng(0).bytes(999),
    ):
        assert without_location(noise) == noise


def test_an_image_without_its_place_is_a_new_one_that_can_be_read_again(tmp_path: Path) -> None:
    there, plain_one = FILES["JPEG"], encoded(PICTURE, "JPEG", quality=60)
    write_folder(tmp_path, [("a.jpg", there), ("b.jpg", plain_one)])
    (piece,) = pieces(tmp_path)
    tables, _ = ingest_slice("pool", piece, Ingest(strip_location=True))
    rows = {row["image_id"]: row for row in tables["images"].to_pylist()}
    clean = without_location(there)
    assert rows.keys() == {id_of(clean), id_of(plain_one)}
    assert rows[id_of(clean)]["derived_from"] == id_of(there) and not rows[id_of(clean)]["located"]
    places = [Location(**{k: v for k, v in row.items() if k != "set"}) for row in tables["locations"].to_pylist()]
    assert {data for _, data in read_images(places)} == {clean, plain_one}
    for one in (id_of(clean), id_of(there)):
        tables, _ = ingest_slice("pool", piece, Ingest(strip_location=True), frozenset({one}))
        assert tables["rejects"]["reason"].to_pylist() == ["forgotten"]
    tables, _ = ingest_slice("pool", piece, Ingest())
    assert {row["image_id"]: row["located"] for row in tables["images"].to_pylist()}[id_of(there)]
