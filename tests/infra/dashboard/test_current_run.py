"""A dashboard stays with the run that it was started with, and every page names the run that it is about."""

from __future__ import annotations

import re
from pathlib import Path

from dashboard_client import browsing
from inspected_world import inspected, make

from lodeset.infra.dashboard.data import opened
from lodeset.infra.dashboard.pages import PAGES

BADGE = re.compile(r'<span class="badge">run (\d+)</span></div>')


def test_another_run_changes_no_page_until_it_is_asked_for(tmp_path: Path) -> None:
    store, made = inspected(tmp_path, 60)
    with opened(store.store, made) as data, browsing(store, data) as client:
        client.headers["Accept"] = "text/html"
        make(tmp_path, 60, pictures=True, part=100, decided=5)  # run 2 ends
        assert store.store.run_numbers() == [1, 2]
        for page in PAGES:
            shown = client.get(page.path).text
            assert BADGE.findall(shown) == ["1"], page.path
            assert all(f'href="{one.path}?run=1"' in shown for one in PAGES), page.path
        home = client.get("/").text
        assert "<h1>Run 1</h1>" in home and "Run 2 has finished" in home
        later = client.get("/?run=2").text
        assert "<h1>Run 2</h1>" in later and BADGE.findall(later) == ["2"]
        assert client.get("/images?run=2").text.count("--run 2 --make-only") == 1


def test_a_dashboard_without_a_run_of_its_own_names_the_last_one(tmp_path: Path) -> None:
    store, _ = inspected(tmp_path, 60)
    with browsing(store) as client:
        for path in ("/", "/images", "/map"):
            assert BADGE.findall(client.get(path).text) == ["1"], path
