"""Two runs beside each other, and from a cluster to a query and a shard, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Chromium, Served, serious, served
from inspected_world import inspected

from lodeset.infra.dashboard.data import opened

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("two")
    inspected(folder)
    open_, made = inspected(folder, decided=1)
    with opened(open_.store, made) as data, served(open_, base_path="/data/zoo", data=data) as running:
        yield running


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_what_changed_is_a_click_away(
    browser: Chromium, two_runs: Served, screenshots: Path, axe: str, width: int, scheme: str
) -> None:
    with browser.visit(two_runs, "/?run=2", width=width, scheme=scheme) as page:
        page.click("text=What changed")
        assert page.locator("h1").inner_text() == "Run 2 compared with run 1"
        page.screenshot(path=screenshots / f"diff-{width}-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert serious(page, axe) == []
        cell = page.locator(".matrix td:not(.same) a").first
        count = int(cell.inner_text().replace(",", ""))
        cell.click()
        assert page.locator("#images h2").inner_text().startswith(f"{count:,} image")
        assert page.locator("#images figure").count() == min(60, count)
        address = page.url
        page.go_back()
        page.go_forward()
        assert page.url == address
        assert page.locator(".matrix td[aria-current]").count() == 1


def test_from_a_cluster_to_a_query_and_a_shard(browser: Chromium, two_runs: Served, axe: str) -> None:
    with browser.visit(two_runs, "/clusters") as page:
        page.click("text=logarithmic")
        assert "scale=log" in page.url
        page.click(".boxes h3 a")
        assert re.fullmatch(r"Cluster \d+", page.locator("h1").inner_text())
        assert serious(page, axe) == []
        page.goto(f"{two_runs.url}/retrieval")
        page.click(".strips p a")
        assert page.locator("h1").inner_text() == "A query of flowers"
        assert serious(page, axe) == []
        page.goto(f"{two_runs.url}/shards")
        page.click("tbody th a >> nth=-1")
        assert page.locator("h1").inner_text() == "shard-000000.tar"
        assert serious(page, axe) == []
