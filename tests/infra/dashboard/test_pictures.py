"""Pictures are those of their images, always WebP, and a source that is gone leaves a picture that says so."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from inspected_world import inspected
from PIL import Image

from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.decoding import PictureError, small
from lodeset.infra.dashboard.site import Site

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Data, Path]]:
    folder = tmp_path_factory.mktemp("inspected")
    open_, made = inspected(folder)
    with opened(open_.store, made) as data:
        app = create_app(Site(opened=open_, token=TOKEN, port=80, data=data))
        with TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            yield client, data, folder


def pixels(answer: object) -> np.ndarray:
    image = Image.open(io.BytesIO(answer.content))
    assert image.format == "WEBP" and answer.headers["content-type"] == "image/webp"
    return np.asarray(image.convert("RGB"), int)


def test_a_picture_is_that_of_its_image(shown: tuple[TestClient, Data, Path]) -> None:
    client, data, _ = shown
    for row in data.rows("SELECT * FROM inspected WHERE set = 'pool' ORDER BY image_id LIMIT 3"):
        with open(row["uri"], "rb") as tar:
            tar.seek(row["offset"])
            whole = np.asarray(Image.open(io.BytesIO(tar.read(row["size_bytes"]))).convert("RGB"), int)
        for path in (f"/thumb/{row['image_id']}.webp", f"/picture/{row['image_id']}.webp"):
            answer = client.get(path)
            assert answer.headers["cache-control"] == "private, no-cache"
            assert np.abs(pixels(answer) - whole).mean() < 12
        assert max(pixels(client.get(f"/picture/{row['image_id']}.webp?side=32")).shape) == 32


def test_what_cannot_be_shown_is_a_picture_that_says_so(shown: tuple[TestClient, Data, Path]) -> None:
    client, data, folder = shown
    (row,) = data.rows("SELECT * FROM inspected WHERE set = 'pool' LIMIT 1")
    assert client.get(f"/thumb/{'0' * 32}.webp").headers["cache-control"] == "private, no-store"
    shutil.move(folder / "pool.tar", folder / "away.tar")
    try:
        answer = client.get(f"/picture/{row['image_id']}.webp")
        assert answer.headers["cache-control"] == "private, no-store" and pixels(answer).shape[:2] == (640, 640)
        assert "etag" in client.get(f"/thumb/{row['image_id']}.webp").headers
    finally:
        shutil.move(folder / "away.tar", folder / "pool.tar")
    for wrong in ("/thumb/../etc.webp", "/thumb/xyz.webp", f"/picture/{'0' * 32}.webp?side=100000"):
        assert client.get(wrong).status_code in (404, 422)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "no image"),
        (b"", "no image"),
    ],
)
def test_only_images_are_decoded(data: bytes, told: str) -> None:
    with pytest.raises(PictureError, match=told):
        small(data, 64, 10**6)


def test_an_image_with_too_many_pixels_is_refused_by_its_header() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(buffer, "PNG")
    with pytest.raises(PictureError, match="too_many_pixels"):
        small(buffer.getvalue(), 64, 10**6)


def test_rows_are_found_by_image_id(shown: tuple[TestClient, Data, Path]) -> None:
    _, data, _ = shown
    ids = [row["image_id"] for row in data.rows("SELECT image_id FROM inspected ORDER BY row")]
    assert data.image_ids(np.arange(len(ids), dtype=np.int32)) == ids
    for number in (0, 7, len(ids) - 1):
        assert [ids[n] for n in data.rows_of(ids[number])] == [ids[number]] * ids.count(ids[number])
    assert not data.rows_of("0" * 32) and not data.rows_of("\u00e9")
