"""One image's page and the search say what the tables say, and an uploaded picture finds those that look like it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Chromium, Served
from dashboard_client import shown
from fastapi.testclient import TestClient
from inspected_world import HOSTILE
from PIL import Image

from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.pages import search
from lodeset.infra.dashboard.vectors import vectors_of
from lodeset.infra.looking import looking
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables.vectors import read_vectors


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Data]]:
    with shown(tmp_path_factory.mktemp("inspected")) as made:
        yield made


def ids_on(text: str) -> list[str]:
    return re.findall(r'data-title="([0-9a-f]{32})"', text)


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        ("in_shard", r"In [\w./-]+, selected for"),
        ("not_selected", "Kept by dedup, and selected by no curated set"),
        ("near", r"Dropped by dedup as a copy of another image of the pool"),
        ("nsfw", r"Dropped by the filter nsfw \(0\.\d+, where the limit is 0\.5\)"),
        ("curated_set", "An image of the curated set flowers, not of the pool"),
    ],
)
def test_the_page_says_why_an_image_is_here_or_not(world: tuple[TestClient, Data], outcome: str, told: str) -> None:
    client, data = world
    row = data.rows("SELECT * FROM inspected WHERE outcome = ? AND image_id NOT IN (SELECT image_id FROM inspected "
                    "GROUP BY image_id HAVING count(*) > 1) LIMIT 1", [outcome])[0]  # fmt: skip
    text = client.get(f"/image/{row['image_id']}").text
    assert re.search(rf'<p class="why">{told}', text)
    assert html.escape(row["uri"]) in text and f"{row['width']:,} x {row['height']:,}" in text
    if row["cluster"] is not None:
        assert f'href="/clusters/{row["cluster"]}"' in text
    if row["group_id"]:
        group = data.rows("SELECT image_id FROM inspected WHERE group_id = ?", [row["group_id"]])
        assert set(ids_on(text)) == {one["image_id"] for one in group}
    story = client.get(f"/image/{row['image_id']}/story").text
    sentence = looking.trace(client.app.state.site.opened, row["image_id"]).sentence
    assert html.escape(sentence[1:]) in story.replace("&#39;", "&#x27;")
    assert html.escape(sentence[1:]) in client.get(f"/image/{row['image_id']}?story=true").text.replace(
        "&#39;", "&#x27;"
    )


def test_an_image_that_nobody_knows_has_no_page(world: tuple[TestClient, Data]) -> None:
    answer = world[0].get(f"/image/{'0' * 32}")
    assert answer.status_code == 404 and "no run of this store knows" in html.unescape(answer.text).lower()
    assert world[0].get("/image/xyz").status_code == 422


def test_neighbors_are_the_most_similar_vectors(world: tuple[TestClient, Data]) -> None:
    client, data = world
    ids, matrix = [], []
    for id_, artifact in data.inspected.held.artifacts.items():
        if id_.startswith("embed/"):
            some, vectors = read_vectors(data.store, artifact.tables["vectors"])
            ids += some
            matrix.append(vectors.astype(np.float32))
    every = np.concatenate(matrix)
    asked = ids[17]
    similarity = every @ every[17]
    best = [ids[n] for n in np.argsort(-similarity) if ids[n] != asked]
    found = ids_on(client.get(f"/image/{asked}/neighbors").text)
    assert found == list(dict.fromkeys(best))[: len(found)] and len(found) >= 20
    with pytest.raises(LodesetError, match="the embedder has changed"):
        vectors_of(data).nearest(np.zeros(3, np.float32), 4)


def test_search_leads_to_what_is_meant(world: tuple[TestClient, Data]) -> None:
    client, data = world
    row = data.rows("SELECT * FROM inspected WHERE set = 'pool' AND member = '00000123.jpg'")[0]
    here = f"/image/{row['image_id']}"
    for text in (
        row["image_id"],
        row["image_id"][:12].upper(),
        f"{row['uri']}#{row['member']}",
        f" {row['image_id']} ",
    ):
        assert client.get("/search", params={"q": text}).headers["location"] == here
    several = data.rows(
        "SELECT image_id[1:4] AS p FROM inspected GROUP BY p HAVING count(DISTINCT image_id) > 1 LIMIT 1"
    )
    if several:
        there = client.get("/search", params={"q": several[0]["p"]}).headers["location"]
        assert all(i.startswith(several[0]["p"]) for i in ids_on(client.get(there).text))
    assert client.get("/search", params={"q": "lass-3"}).headers["location"] == "/images?text=lass-3"
    hostile = client.get("/search", params={"q": HOSTILE})
    assert hostile.status_code == 303 and HOSTILE not in hostile.headers["location"]
    nothing = client.get("/search", params={"q": "<b>nothing</b>"}).text
    assert "&lt;b&gt;nothing" in nothing and "<b>nothing" not in nothing
    assert client.get("/search").status_code == 200
    assert "knows nothing" in client.get("/search", params={"q": "/etc/passwd"}).text


def png(color: tuple[int, int, int], side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_uploaded_picture_finds_its_like(world: tuple[TestClient, Data], monkeypatch: pytest.MonkeyPatch) -> None:
    client, data = world
    ids, matrix = read_vectors(data.store, data.inspected.held.artifacts["embed/pool"].tables["vectors"])
    monkeypatch.setattr(search, "embedded", lambda *_: matrix[5].astype(np.float32))
    own = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
    form = client.post("/search", files={"picture": ("x.png", png((9, 9, 9)), "image/png")}, headers=own)
    raw = client.post("/search", content=png((9, 9, 9)), headers={**own, "Content-Type": "image/png"})
    assert form.status_code == 303 and form.headers["location"] == raw.headers["location"]
    page = client.get(form.headers["location"])
    assert ids_on(page.text)[0] == ids[5]
    picture = client.get(form.headers["location"] + ".webp")
    assert picture.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(picture.content)).format == "WEBP"
    row = data.rows("SELECT * FROM inspected WHERE set = 'pool' LIMIT 1")[0]
    with open(row["uri"], "rb") as tar:
        tar.seek(row["offset"])
        known = client.post("/search", content=tar.read(row["size_bytes"]), headers=own)
    assert known.headers["location"] == f"/image/{row['image_id']}"
    assert "are gone" in client.get(f"/search/image/{'1' * 32}").text


def test_what_is_no_picture_is_refused(world: tuple[TestClient, Data], monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = world
    own = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
    for body in (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a", b"\x00" * 100):
        answer = client.post("/search", content=body, headers=own)
        assert answer.status_code == 400 and "no image that can be decoded" in answer.text
    assert client.post("/search", content=b"", headers=own).status_code == 422
    assert client.post("/search", content=png((1, 2, 3)), headers={"Origin": "https://evil.example"}).status_code == 403
    monkeypatch.setattr(search, "MOST_PIXELS", 1000)
    assert "too_many_pixels" in client.post("/search", content=png((1, 2, 3)), headers=own).text
    monkeypatch.setattr(search, "UPLOAD_BYTES", 10)
    assert client.post("/search", content=png((1, 2, 3)), headers=own).status_code == 413
    read: list[bytes] = []
    monkeypatch.setattr(search, "_picture", lambda body, kind: read.append(body) or b"")
    form = {"picture": ("x.png", b"\0" * (search.FORM_BYTES + 11), "image/png")}
    assert client.post("/search", files=form, headers=own).status_code == 413 and not read


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_a_picture_is_uploaded_and_an_image_opened(
    browser: Chromium, dashboard: Served, screenshots: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int,
    scheme: str,
) -> None:  # fmt: skip
    data = dashboard.site.data
    assert data is not None
    _, matrix = read_vectors(data.store, data.inspected.held.artifacts["embed/pool"].tables["vectors"])
    monkeypatch.setattr(search, "embedded", lambda *_: matrix[5].astype(np.float32))
    (tmp_path / "mine.png").write_bytes(png((200, 30, 30)))
    with browser.visit(dashboard, "/search", width=width, scheme=scheme) as page:
        page.set_input_files("#upload", tmp_path / "mine.png")
        page.locator("form", has=page.locator("#upload")).locator("button").click()
        page.wait_for_url(lambda url: "/search/image/" in url)
        page.wait_for_load_state("networkidle")
        page.screenshot(path=screenshots / f"search-{width}-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.goto(f"{dashboard.url}/image/{data.image_ids(np.array([3], np.int32))[0]}")
        page.locator("#story table").wait_for()
        page.locator("[aria-label='Most similar images'] img").first.wait_for()
        page.wait_for_load_state("networkidle")
        page.screenshot(path=screenshots / f"image-{width}-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.go_back()
        page.wait_for_url(lambda url: "/search/image/" in url)
