"""The map: what the server draws, sends and selects is what the table says."""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Chromium, Served
from dashboard_client import shown
from fastapi.testclient import TestClient
from PIL import Image

from lodeset.infra.dashboard import density
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.selection import Selection, inside, polygon, rows

LASSO = "-0.4,-0.4;0.5,-0.4;0.4,0.5;-0.4,0.6"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Data]]:
    with shown(tmp_path_factory.mktemp("inspected")) as made:
        yield made


def test_columns_are_those_of_the_table(world: tuple[TestClient, Data]) -> None:
    client, data = world
    answer = client.get("/map/columns/x.bin")
    assert np.array_equal(np.frombuffer(answer.content, "<f4"), data.column("x"), equal_nan=True)
    again = client.get("/map/columns/x.bin", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content
    table = data.rows("SELECT * FROM inspected ORDER BY row")
    for name in ("outcome", "set", "label"):
        codes = np.frombuffer(client.get(f"/map/columns/{name}.bin").content, np.uint8)
        by_value: dict[str, set[int]] = {}
        for row, code in zip(table, codes, strict=True):
            by_value.setdefault(row[name], set()).add(int(code))
        assert all(len(found) == 1 for found in by_value.values())
        assert len({min(found) for found in by_value.values()}) == len(by_value)
    clusters = np.frombuffer(client.get("/map/columns/cluster.bin").content, np.uint8)
    assert {code == 12 for row, code in zip(table, clusters, strict=True) if row["cluster"] is None} == {True}
    assert client.get("/map/columns/uri.bin").status_code == 404


def test_a_lasso_comes_back_as_bits(world: tuple[TestClient, Data]) -> None:
    client, data = world
    expected = inside(polygon(LASSO), data.column("x"), data.column("y"))
    mask = client.get("/map/mask.bin", params={"lasso": LASSO}).content
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: len(expected)]
    assert 0 < expected.sum() < len(expected) and np.array_equal(bits.astype(bool), expected)
    page = client.get("/map/selected", params={"lasso": LASSO})
    assert f"<h2>{int(expected.sum())} selected</h2>" in page.text
    assert client.get("/map/mask.bin?lasso=1,1;x").status_code == 400


def test_the_density_is_where_the_images_are(world: tuple[TestClient, Data]) -> None:
    client, data = world
    answer = client.get("/map/density.webp", params={"box": "-2,-2,2,2"})
    image = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGBA"))
    assert answer.headers["content-type"] == "image/webp" and image.shape == (density.HEIGHT, density.WIDTH, 4)
    x, y = data.column("x"), data.column("y")
    column = ((x + 2) / 4 * density.WIDTH).astype(int)
    row = ((2 - y) / 4 * density.HEIGHT).astype(int)
    assert (image[row, column, 3] > 0).all()
    cells = {(r // 6, c // 6) for r, c in zip(row, column, strict=True)}
    assert (image[:, :, 3] > 0).sum() == 36 * len(cells)
    some = rows(data, Selection(lasso=LASSO))
    chosen = np.asarray(
        Image.open(
            io.BytesIO(client.get("/map/density.webp", params={"box": "-2,-2,2,2", "lasso": LASSO}).content)
        ).convert("RGBA")
    )
    assert (chosen[row[some], column[some], 0] > 200).all()
    for wrong in ("1,2,3", "0,0,0,1", "nan,0,1,1", "1e9,0,1,1"):
        assert client.get("/map/density.webp", params={"box": wrong}).status_code == 400


def test_without_scripts_links_and_a_form_do_it(world: tuple[TestClient, Data]) -> None:
    client, data = world
    text = client.get("/map?by=set").text
    placed = Counter(r["set"] for r in data.rows("SELECT set FROM inspected WHERE x IS NOT NULL"))
    legend = re.findall(r'<a href="([^"]+)" data-filter><i class="k\d+"></i><span>([^<]+)</span><b>([\d,]+)</b>', text)
    assert {(name, int(n)) for _, name, n in legend} == set(placed.items())
    for href, _, count in legend:
        assert f"<h2>{count} selected</h2>" in client.get(html.unescape(href)).text
    (closer,) = re.findall(r'href="([^"]+)" data-move="in"', text)
    assert re.search(r"box=[-\d.]+%2C", closer) and client.get(html.unescape(closer)).status_code == 200
    answer = client.get("/map?left=-0.5&right=0.5&bottom=-0.5&top=0.5&set=pool")
    assert answer.status_code == 303
    there = client.get(answer.headers["location"]).text
    x, y = data.column("x"), data.column("y")
    pool = np.array([r["set"] == "pool" for r in data.rows("SELECT set FROM inspected ORDER BY row")])
    within = (abs(x) < 0.5) & (abs(y) < 0.5) & pool
    assert f"<h2>{int(within.sum())} selected</h2>" in there


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_drawing_around_images_selects_them(browser: Chromium, dashboard: Served, screenshots: Path) -> None:
    data = dashboard.site.data
    assert data is not None
    with browser.visit(dashboard, "/map") as page:
        page.wait_for_selector("#map[data-points]")
        assert page.locator("#map").get_attribute("data-points") == str(int(np.isfinite(data.column("x")).sum()))
        page.click("[data-tool=lasso]")
        box = page.locator("#map").bounding_box()
        middle, level = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(middle - 150, level - 100)
        page.mouse.down()
        for x, y in ((150, -100), (160, 100), (-150, 120)):
            page.mouse.move(middle + x, level + y, steps=4)
        page.mouse.up()
        page.wait_for_selector("#map[data-chosen]")
        page.wait_for_selector("#selected h2")
        lasso = page.evaluate("new URLSearchParams(location.search).get('lasso')")
        expected = int(inside(polygon(lasso), data.column("x"), data.column("y")).sum())
        assert 0 < expected < len(data.column("x"))
        assert page.locator("#map").get_attribute("data-chosen") == str(expected)
        assert page.locator("#selected h2").inner_text() == f"{expected} selected"
        page.screenshot(path=screenshots / "map-lasso-1440-light.png")
        drawn = page.url
        page.locator("#selected .condition").click()
        page.wait_for_selector("#selected h2", state="detached")
        page.go_back()
        page.wait_for_selector("#selected h2")
        assert page.url == drawn and page.locator("#map polygon").get_attribute("points")
        page.goto(drawn)  # a link that somebody else opens
        page.wait_for_selector("#map[data-chosen]")
        assert page.locator("#map").get_attribute("data-chosen") == str(expected)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_the_keyboard_moves_and_selects(browser: Chromium, dashboard: Served) -> None:
    data = dashboard.site.data
    assert data is not None
    with browser.visit(dashboard, "/map?by=cluster") as page:
        page.wait_for_selector("#map[data-points]")
        page.focus("#map")
        for key in ("+", "ArrowLeft", "v"):
            page.keyboard.press(key)
        page.wait_for_selector("#map[data-chosen]")
        lasso = page.evaluate("new URLSearchParams(location.search).get('lasso')")
        expected = int(inside(polygon(lasso), data.column("x"), data.column("y")).sum())
        assert page.locator("#map").get_attribute("data-chosen") == str(expected)
        page.wait_for_url(lambda url: "box=" in url)
        page.select_option("#by", "set")
        page.wait_for_url(lambda url: "by=set" in url)
        page.locator("#selected .legend a", has_text="pool").wait_for()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_without_webgl_the_picture_is_selected_from(browser: Chromium, dashboard: Served) -> None:
    with browser.visit(dashboard) as page:
        page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
        page.goto(f"{dashboard.url}/map")
        page.locator("#map-told", has_text="no WebGL").wait_for()
        page.focus("#map")
        page.keyboard.press("v")
        page.wait_for_selector("#selected h2")
        assert "lasso=" in page.locator("#density").get_attribute("src")
