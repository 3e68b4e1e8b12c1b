"""The slider and the keys of an audit in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import Chromium, Served, serious

from lodeset.infra.dashboard.samples import decision, sample

pytestmark = [pytest.mark.slow, pytest.mark.browser]


def test_the_slider_shows_at_once_what_its_value_changes(
    browser: Chromium, dashboard: Served, screenshots: Path, axe: str
) -> None:
    with browser.visit(dashboard, "/duplicates") as page:
        assert "the value of the run" in page.inner_text("#line")
        slider = page.locator("#value")
        slider.focus()
        with page.expect_response("**/duplicates/line?*"):
            page.keyboard.press("ArrowRight")
        page.get_by_role("heading", name="min_score = 4.1").wait_for()
        with page.expect_response("**/duplicates/line?*"):
            slider.fill("7")
        page.get_by_role("heading", name="min_score = 7").wait_for()
        assert page.url.endswith("/duplicates?setting=min_score&value=7.0")  # a link to the view
        assert slider.evaluate("one => one === document.activeElement")  # it is not replaced under the hand
        back = page.locator("section", has=page.get_by_role("heading", name="Would come back"))
        assert back.locator("img").first.evaluate("one => one.decode().then(() => one.naturalWidth)") > 0
        page.screenshot(path=screenshots / "slider.png", full_page=True)
        assert serious(page, axe) == []
        page.reload()
        page.get_by_role("heading", name="min_score = 7").wait_for()
        page.get_by_role("link", name="Commit this value").click()
        page.wait_for_load_state("networkidle")
        assert "+  min_score: 7" in page.inner_text(".diff")
        page.locator("#plan").get_by_text("stages would run").wait_for()
        page.screenshot(path=screenshots / "commit.png", full_page=True)
        assert serious(page, axe) == []
        with page.expect_download() as got:
            page.get_by_role("link", name="Download", exact=True).click()
        assert got.value.suggested_filename == "min_score-7.patch"
        page.go_back()
        page.get_by_role("heading", name="min_score = 7").wait_for()


def test_evidence_of_a_pair_is_pictured(browser: Chromium, dashboard: Served, screenshots: Path, axe: str) -> None:
    with browser.visit(dashboard, "/duplicates/groups") as page:
        page.screenshot(path=screenshots / "groups.png", full_page=True)
        assert serious(page, axe) == []
        page.get_by_role("link", name="Evidence").first.click()
        for image in page.locator(".evidence img").all():
            image.scroll_into_view_if_needed()
            assert image.evaluate("one => one.decode().then(() => one.naturalWidth)") == 96
        page.screenshot(path=screenshots / "pair.png", full_page=True)
        assert serious(page, axe) == []


def test_samples_are_judged_by_keys(browser: Chromium, dashboard: Served, screenshots: Path, axe: str) -> None:
    data = dashboard.site.data
    assert data is not None
    of = "drop/dedup/pool/near"
    ids = [one.id for one in sample(data, decision(data, of), 20)]
    current = ".item.current"
    with browser.visit(dashboard, f"/audit/judge?of={of}&size=20") as page:
        assert page.locator(".item:visible").count() == 1
        page.locator(f"{current} img").first.evaluate("one => one.decode()")
        page.screenshot(path=screenshots / "judge.png", full_page=True)
        assert serious(page, axe) == []
        for key in "rwu":
            page.keyboard.press(key)
        assert page.get_attribute(current, "data-id") == ids[3]
        page.keyboard.press("b")
        page.keyboard.press("b")
        assert page.get_attribute(current, "data-id") == ids[1]
        assert page.locator(f"{current} input:checked").get_attribute("value") == "wrong"
        page.keyboard.press("r")
        page.get_by_text("2 right, 0 wrong, 1 unsure").wait_for()
        page.reload()  # the tab remembers
        page.get_by_text("2 right, 0 wrong, 1 unsure").wait_for()
        assert page.get_attribute(current, "data-id") == ids[3]
        for _ in ids[3:]:
            page.keyboard.press("w")
        assert page.locator("#finished").is_visible()
        page.get_by_text(f"{len(ids) - 3} wrong").wait_for()
        page.goto(f"{dashboard.url}/audit")
        page.get_by_text(f"{len(ids)} judged in this tab").wait_for()
        page.goto(f"{dashboard.url}/audit/judge?of=drop/filter/pool/blurry&size=20")
        page.locator(".verdict.right:visible").click()
        with page.expect_download() as got:
            page.click("#download")
        told = json.loads(Path(got.value.path()).read_text())
        counts = {one["of"]: len(one["verdicts"]) for one in told["samples"]}
        assert counts == {of: len(ids), "drop/filter/pool/blurry": 1}
