"""The dashboard on what the demo made, from ingest to pruning, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import chromium, served
from runs import WholeRun

from lodeset.infra.dashboard.data import opened
from lodeset.infra.dashboard.making import inspect
from lodeset.infra.dashboard.pages import PAGES
from lodeset.infra.session import open_store

pytestmark = pytest.mark.slow


def test_every_page_opens_on_what_the_demo_made(whole: WholeRun, tmp_path: Path) -> None:
    store = open_store(whole.config)
    made = inspect(store, lambda event: None)
    with chromium() as browser, opened(store.store, made) as data, served(store, data=data) as dashboard:
        for page in PAGES:
            with browser.visit(dashboard, page.path) as shown:
                shown.wait_for_load_state("networkidle")
                shown.screenshot(path=tmp_path / f"{page.id}.png", full_page=True)
                missing = shown.evaluate(
                    "[...document.images].filter((i) => i.getAttribute('src') && i.complete && !i.naturalWidth).map((i) => i.src)"
                )
                assert missing == [], f"pictures of {page.path} do not load"
                assert len(shown.locator("main").inner_text()) > 100
        one = data.rows("SELECT image_id FROM inspected WHERE outcome = 'in_shard' ORDER BY image_id")[0]["image_id"]
        with browser.visit(dashboard, f"/image/{one}") as shown:
            assert "shard" in shown.locator("main").inner_text()
