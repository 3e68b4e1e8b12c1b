"""The evidence of a pair pictures what the close look saw: key points that agree, and blocks whose details differ."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from builders import encoded, textured
from fastapi.testclient import TestClient
from inspected_world import inspected
from PIL import Image, ImageDraw

from lodeset.infra.dashboard import close_looks
from lodeset.infra.dashboard.app import create_app
from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.pages import duplicates
from lodeset.infra.dashboard.site import Site
from lodeset.pipeline.algorithms.copies.keypoints import aligned, described

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Data]]:
    made, found = inspected(tmp_path_factory.mktemp("inspected"))
    with opened(made.store, found) as data:
        app = create_app(Site(opened=made, token=TOKEN, port=80, data=data))
        with TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            yield client, data


@pytest.fixture
def pair(world: tuple[TestClient, Data], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Gives one pair of the run other images, and another record of its close look."""
    _, data = world
    edge = next(row for row in data.pairs.to_pylist() if row["linked"])
    first, second = sorted(data.dedup.images.ids[edge[end]] for end in "ab")

    def become(one: Image.Image | bytes, other: Image.Image | bytes, **record: Any) -> tuple[str, str]:
        given = {i: it if isinstance(it, bytes) else encoded(it) for i, it in ((first, one), (second, other))}
        stored = data.edge(first, second)
        monkeypatch.setattr(type(data), "edge", lambda self, a, b: {**stored, **record})
        monkeypatch.setattr(duplicates, "source_bytes", lambda site, data, image_id: given[image_id])
        return first, second

    return become


def halves(answer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The two pictures of an answer, where both have one size."""
    image = Image.open(io.BytesIO(answer.content))
    assert (answer.status_code, image.format, answer.headers["content-type"]) == (200, "WEBP", "image/webp")
    pixels, width = np.asarray(image.convert("RGB"), int), (image.width - close_looks.GAP) // 2
    return pixels[:, :width], pixels[:, -width:]


def marks(pixels: np.ndarray) -> np.ndarray:
    """Where a gray picture has colors."""
    return np.ptp(pixels, axis=2) > 100


def near(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(pixels - color).max(axis=2) < 50


def test_key_points_that_agree_are_marked_alike_in_both(
    world: tuple[TestClient, Data], pair: Callable[..., Any]
) -> None:
    client, _ = world
    image = textured(1, 200, 160)
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = aligned(described(image), described(flipped))
    assert found is not None
    a, b = pair(image, flipped, points=found.inliers, score=9.0)
    page = client.get("/duplicates/pair", params={"a": b, "b": a}).text
    assert f"The {found.inliers} that agree" in page and f'left <span class="mono">{a[:8]}' in page
    left, right = halves(client.get("/duplicates/pair/points.webp", params={"a": b, "b": a}))
    back = right[:, ::-1]
    assert left.shape == (512, 640, 3) and 0.01 < marks(left).mean() < 0.3
    both = marks(left) & marks(back)
    assert both.sum() > 0.6 * (marks(left) | marks(back)).sum()  # numbers aside, which are not mirrored
    assert np.abs(left - back)[both].mean() < 40  # in the same colors


def test_blocks_that_differ_are_outlined_in_both(world: tuple[TestClient, Data], pair: Callable[..., Any]) -> None:
    client, _ = world
    image = textured(2, 400, 320)
    changed = image.copy()
    changed.paste(textured(3, 400, 320).crop((0, 0, 120, 100)), (40, 40))
    pixels = np.array(changed)
    pixels[200:300, 240:380] = pixels[200:300, 240:380] * (0.5, 1, 0.5)
    a, b = pair(image, Image.fromarray(pixels), points=99, detail_score=-3.25)
    assert "score -3.25" in client.get("/duplicates/pair", params={"a": a, "b": b}).text
    answer = client.get("/duplicates/pair/details.webp", params={"a": a, "b": b})
    for half in halves(answer):
        assert half.shape == (320, 400, 3)
        unlike, recolored = near(half, close_looks.UNLIKE), near(half, close_looks.RECOLORED)
        other, green = np.zeros((2, 320, 400), bool)
        other[24:156, 24:176], green[184:316, 224:396] = True, True  # to one block around what was changed
        assert (other | green)[unlike | recolored].mean() > 0.98
        assert unlike[other].sum() > recolored[other].sum() and recolored[green].sum() > unlike[green].sum()
    same = pair(image, image, points=99, detail_score=5.0)
    for half in halves(client.get("/duplicates/pair/details.webp", params=dict(zip("ab", same, strict=True)))):
        assert not near(half, close_looks.UNLIKE).any() and not near(half, close_looks.RECOLORED).any()


def test_images_of_other_shapes_are_drawn_on_the_grid_of_the_second(
    world: tuple[TestClient, Data], pair: Callable[..., Any]
) -> None:
    """A crop, turned: of the first image what the crop shows, as the crop shows it."""
    client, _ = world
    image = textured(4, 600, 300)
    crop = image.crop((100, 20, 380, 290)).transpose(Image.Transpose.ROTATE_90)
    a, b = pair(image, crop, points=50, detail_score=2.0)
    left, right = halves(client.get("/duplicates/pair/details.webp", params={"a": a, "b": b}))
    assert left.shape == (2 * 280, 2 * 270, 3)  # enlarged
    assert np.abs(left - right).mean() < 6
    wide = Image.open(io.BytesIO(client.get("/duplicates/pair/points.webp", params={"a": a, "b": b}).content))
    assert wide.size == (640 + close_looks.GAP + 617, 640)


@pytest.mark.parametrize(
    ("record", "told", "refused"),
    [
        ({"points": None, "detail_score": None}, "did not look at the full images of this pair", {"points", "details"}),
        ({"points": 0, "detail_score": None}, "Too few key points of the two images agree", {"points", "details"}),
        ({"points": 0, "detail_score": 1.5}, "Too few key points of the two images agree", {"points"}),
        ({"points": 7, "detail_score": None}, "Details were not compared", {"details"}),
    ],
)
def test_what_was_not_looked_at_is_told(
    world: tuple[TestClient, Data], pair: Callable[..., Any], record: dict[str, Any], told: str, refused: set[str]
) -> None:
    client, _ = world
    a, b = pair(textured(5), textured(5), **record)
    page = client.get("/duplicates/pair", params={"a": a, "b": b}).text
    assert told in page
    for kind in ("points", "details"):
        answer = client.get(f"/duplicates/pair/{kind}.webp", params={"a": a, "b": b})
        assert answer.status_code == (404 if kind in refused else 200)
        assert (f"/duplicates/pair/{kind}.webp" in page) == (kind not in refused)


def test_what_cannot_be_drawn_is_a_picture_that_says_so(
    world: tuple[TestClient, Data], pair: Callable[..., Any]
) -> None:
    """Neither an image that is none, nor two that no longer agree, is an error of the server."""
    client, _ = world
    flat = Image.new("RGB", (300, 200), (90, 90, 90))
    ImageDraw.Draw(flat).rectangle((50, 50, 90, 90), fill="white")
    for one, other in ((flat, textured(6, 300, 200)), (b"no image", flat)):
        where = dict(zip("ab", pair(one, other, points=9, detail_score=1.0), strict=True))
        for kind in ("points", "details"):
            answer = client.get(f"/duplicates/pair/{kind}.webp", params=where)
            assert answer.status_code == 200 and Image.open(io.BytesIO(answer.content)).size == (640, 640)
