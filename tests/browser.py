"""A real browser before a real dashboard. Whatever goes wrong on a page fails the test that opened it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lodeset.infra.dashboard.serving import listening, server
from lodeset.infra.dashboard.site import Site
from lodeset.infra.session import Opened

TOKEN = "a-token-of-the-tests"
AXE = "axe-core@4.14.1"
NAMES = ("chromium", "chromium-browser", "google-chrome")
SERIOUS = ("serious", "critical")
WATCH = """document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`the policy forbids ${event.violatedDirective}: ${event.blockedURI} ${event.sample}`));"""


@dataclass(frozen=True)
class Served:
    """A dashboard that runs. `url` is the address of its first page; `entry` is the one with the token."""

    site: Site
    url: str

    @property
    def entry(self) -> str:
        return f"{self.url}/?token={TOKEN}"


@contextlib.contextmanager
def served(opened: Opened, **options: Any) -> Iterator[Served]:
    """Runs a dashboard in a thread; `options` are further fields of `Site`."""
    with contextlib.closing(listening(0)) as listener:
        site = Site(opened=opened, token=TOKEN, port=listener.getsockname()[1], **options)
        running = server(site)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            end = time.monotonic() + 20
            while not running.started and time.monotonic() < end:
                time.sleep(0.01)
            assert running.started
            yield Served(site, f"http://127.0.0.1:{site.port}{site.base_path}")
        finally:
            running.should_exit = True
            thread.join(20)


class Chromium:
    """A browser of this machine."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser

    @contextlib.contextmanager
    def visit(
        self,
        dashboard: Served,
        path: str = "/",
        *,
        width: int = 1440,
        scheme: str = "light",
        expected: tuple[str, ...] = (),
    ) -> Iterator[Any]:
        """A page of playwright that shows `path`. Afterwards, errors on its console, what its policy forbids, exceptions and
        requests to other hosts fail the test, except for messages that hold one of `expected`.
        """
        problems: list[str] = []
        context = self._browser.new_context(
            viewport={"width": width, "height": 844 if width < 500 else 900},
            color_scheme=scheme,
            reduced_motion="reduce",
        )
        try:
            context.add_init_script(WATCH)
            context.route(lambda url: not _own(url, dashboard), lambda route: _blocked(route, problems))
            page = context.new_page()
            page.set_default_timeout(15_000)
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(dashboard.entry)
            if path != "/":
                page.goto(f"{dashboard.url}{path}")
            yield page
        finally:
            context.close()
        assert [one for one in problems if not any(word in one for word in expected)] == []


def _own(url: str, dashboard: Served) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob") or parts.netloc == f"127.0.0.1:{dashboard.site.port}"


def _blocked(route: Any, problems: list[str]) -> None:
    problems.append(f"a request to {route.request.url}")
    route.abort()


@contextlib.contextmanager
def chromium() -> Iterator[Chromium]:
    """Starts the browser, or skips the test with the reason."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=path, args=arguments)
        try:
            yield Chromium(browser)
        finally:
            browser.close()


def axe_source(folder: Path) -> str:
    """The script of axe, from npm; skips the test with the reason where it can't be had."""
    script = folder / "node_modules/axe-core/axe.min.js"
    if not script.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("no axe-core: npm is not on PATH")
        command = [npm, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", AXE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            pytest.skip(f"no axe-core: npm ended with {done.stderr.strip()[-300:]}")
    return script.read_text()


def serious(page: Any, source: str) -> list[str]:
    """What axe finds on a page that keeps people out, a line a finding."""
    page.evaluate(source)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {one['help']}: {json.dumps([node['html'][:200] for node in one['nodes'][:3]])}"
        for one in found["violations"]
        if one["impact"] in SERIOUS
    ]
