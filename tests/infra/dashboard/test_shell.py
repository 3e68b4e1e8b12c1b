"""What every page does in a real browser."""

import dataclasses
from pathlib import Path

import pytest
from browser import Chromium, Served, serious

from lodeset.infra.dashboard.pages import PAGES
from lodeset.pipeline.dag.manifests import sealed
from lodeset.pipeline.dag.store import run_path

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.xdist_group("browser")]
EACH_PAGE = pytest.mark.parametrize("path", [pytest.param(page.path, id=page.id) for page in PAGES])


@EACH_PAGE
def test_every_page_opens(browser: Chromium, dashboard: Served, screenshots: Path, axe: str, path: str) -> None:
    """Nothing is wrong on it, nobody is kept out of it, and it is not wider than the screen: of any size, in light and dark."""
    with browser.visit(dashboard, path) as page:
        page.wait_for_load_state("networkidle")
        assert page.locator("h1").count() == 1
        assert page.locator("nav a[aria-current=page]").count() == 1
        name = path.strip("/").replace("/", "-") or "runs"
        for width in (1440, 1024, 390):
            page.set_viewport_size({"width": width, "height": 844 if width < 500 else 900})
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                page.screenshot(path=screenshots / f"{name}-{width}-{scheme}.png", full_page=True)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                if (width, scheme) != (1024, "light"):
                    assert serious(page, axe) == [], (width, scheme)


@EACH_PAGE
def test_every_page_shows_something_without_scripts(browser: Chromium, dashboard: Served, path: str) -> None:
    context = browser._browser.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto(dashboard.entry)
        answer = page.goto(f"{dashboard.url}{path}")
        assert answer.status == 200
        assert len(page.locator("main").inner_text()) > 40
        assert page.locator("nav#side a").count() == len(PAGES)
    finally:
        context.close()


def test_the_token_leaves_the_address(browser: Chromium, dashboard: Served) -> None:
    with browser.visit(dashboard) as page:
        assert page.url == f"{dashboard.url}/"
        (cookie,) = page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/data/zoo")
        assert page.evaluate("document.cookie") == ""


def test_colors_are_remembered_and_come_with_the_page(browser: Chromium, dashboard: Served) -> None:
    with browser.visit(dashboard) as page:
        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(ground)
        page.click("#theme")  # system -> light
        assert page.evaluate(ground) == light
        page.keyboard.press("t")  # light -> dark
        dark = page.evaluate(ground)
        assert dark != light
        page.reload()
        assert page.evaluate(ground) == dark
        assert 'data-theme="dark"' in page.request.get(f"{dashboard.url}/").text()
        page.keyboard.press("t")  # dark -> system
        page.reload()
        assert page.evaluate(ground) == light


def test_keys_are_listed_and_dialogs_close(browser: Chromium, dashboard: Served) -> None:
    with browser.visit(dashboard) as page:
        page.keyboard.press("?")
        assert page.locator("#help").is_visible()
        page.keyboard.press("Escape")
        assert page.locator("#help").is_hidden()
        page.click("#keys")
        page.click("#help [data-close]")
        assert page.locator("#help").is_hidden()


def test_the_navigation_folds_on_phones(browser: Chromium, dashboard: Served) -> None:
    with browser.visit(dashboard, width=390) as page:
        assert page.locator("#side").is_hidden()
        page.click("#menu")
        assert page.locator("#side a").first.is_visible()
        assert page.locator("#menu").get_attribute("aria-expanded") == "true"
        page.keyboard.press("Escape")
        assert page.locator("#side").is_hidden()


def test_the_first_key_leads_past_the_navigation(browser: Chromium, dashboard: Served) -> None:
    with browser.visit(dashboard) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"


def test_an_error_is_a_page_and_to_htmx_a_message(browser: Chromium, dashboard: Served) -> None:
    with browser.visit(dashboard, "/nothing", expected=("404", "400", "Response Status Error")) as page:
        assert "No page has this address" in page.locator("main").inner_text()
        page.evaluate(f"htmx.ajax('GET', '{dashboard.url}/?run=99', '#main')")
        message = page.locator("#toasts .toast.error")
        message.wait_for()
        assert "99" in message.inner_text()
        message.locator("button").click()
        assert message.count() == 0


def test_the_policy_holds_in_the_browser(browser: Chromium, dashboard: Served) -> None:
    """What an injected element would try is refused, whatever the templates do."""
    with browser.visit(dashboard, expected=("policy", "Policy", "404")) as page:
        ran = page.evaluate(
            """async () => {
              const script = document.createElement("script");
              script.textContent = "window.ran = true";
              document.body.append(script);
              const image = document.createElement("img");
              image.setAttribute("onerror", "window.ran = true");
              image.src = "nothing.png";
              document.body.append(image);
              await new Promise((done) => setTimeout(done, 300));
              try { (0, eval)("window.ran = true"); } catch {}
              return Boolean(window.ran);
            }"""
        )
        assert ran is False


def test_a_report_opens_with_its_styles_and_without_scripts(browser: Chromium, dashboard: Served) -> None:
    store = dashboard.site.opened.store
    page_of_run = "<style>body { color: rgb(1, 2, 3) }</style><script>document.title = 'ran'</script><p>report</p>"
    assert store.put_absent("reports/000001.html", page_of_run.encode())
    with browser.visit(dashboard, expected=("Blocked script execution", "policy")) as page:
        with page.expect_popup() as opening:
            page.get_by_role("link", name="Open the report").click()
        report = opening.value
        report.wait_for_load_state()
        assert report.locator("p").inner_text() == "report"
        assert report.evaluate("getComputedStyle(document.body).color") == "rgb(1, 2, 3)"
        assert report.title() == ""


def test_a_run_that_finishes_is_offered_without_a_reload(browser: Chromium, dashboard: Served) -> None:
    store = dashboard.site.opened.store
    with browser.visit(dashboard) as page:
        assert "has finished" not in page.inner_text("main")
        last = store.run(store.run_numbers()[-1])
        again = dataclasses.replace(last, number=last.number + 1, before=last.number)
        assert store.put_absent(run_path(again.number), sealed(dataclasses.asdict(again)))
        try:
            page.evaluate("htmx.trigger('#now', 'refresh')")
            offer = page.get_by_role("link", name="Show it")
            offer.wait_for()
            offer.click()
            assert page.inner_text("h1") == f"Run {again.number}"
            page.go_back()
            assert page.inner_text("h1") == f"Run {last.number}"  # that of the dashboard
        finally:
            store.delete(run_path(again.number))
