"""Turn values into pages: the templates, what they can call, and the pages that say what went wrong."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlencode

from fastapi import Request
from jinja2 import Environment
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from lodeset.infra.dashboard.site import Site
from lodeset.infra.report.reasons import REASONS
from lodeset.infra.report.render import environment as of_package
from lodeset.infra.report.render import harmless

THEMES = ("light", "dark")
THEME_COOKIE = "lodeset_theme"
TITLES = {
    401: "The token is missing",
    403: "Not allowed",
    404: "There is no such page",
    405: "Not possible here",
    413: "Too large",
    421: "Unknown address",
    422: "The address is not complete",
    500: "Something went wrong",
    503: "No answer",
}


def environment(site: Site) -> Environment:
    """The templates of one dashboard. In addition to their values they see `site`, `url`, `command_line`, and what the
    `reasons` of drops mean.
    """
    made = of_package("lodeset.infra.dashboard", "templates")

    def url(path: str, **parameters: Any) -> Markup:
        return Markup(escape(address(site, path, **parameters)))

    def command_line(*words: object) -> str:
        """A command with the configuration that this dashboard shows, e.g. `command_line("plan")`."""
        name, *rest = (str(word) for word in words)
        return shlex.join(["lodeset", name, str(site.opened.path), *rest])

    made.globals |= {"site": site, "url": url, "command_line": command_line, "reasons": REASONS}
    return made


def address(site: Site, path: str, **parameters: Any) -> str:
    """The address of a page, below the base path; parameters that are None or empty are left out."""
    given = {name: value for name, value in parameters.items() if value is not None and value != ""}
    return f"{site.base_path}{path}{'?' if given else ''}{urlencode(given, doseq=True)}"


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page from its template, or a fragment of one for htmx."""
    return _html(request.app.state.templates, request.scope, template, status, values)


def refusal(templates: Environment, scope: Any, status: int, told: str) -> Response:
    """The page that says in one sentence why there is no other; for htmx and for programs, the sentence alone."""
    request = Request(scope)
    wants_page = "hx-request" not in request.headers and "text/html" in request.headers.get("accept", "")
    if not wants_page:
        return PlainTextResponse(str(harmless(told)), status)
    title = TITLES.get(status, "This cannot be shown")
    # A link on another site opens this page without the cookie; a link on this page sends it.
    again = request.url.path if status == 401 else None
    return _html(templates, scope, "error.html.jinja", status, {"title": title, "told": told, "again": again})


def _html(templates: Environment, scope: Any, template: str, status: int, values: dict[str, Any]) -> HTMLResponse:
    from lodeset.infra.dashboard.pages import HOMES, PAGES

    request = Request(scope)
    theme = request.cookies.get(THEME_COOKIE)
    shared = {
        "pages": PAGES,
        "here": _here(request, PAGES, HOMES),
        "run": run_of(request),
        "current_run": current_run(request, cast("Site", templates.globals["site"])),
        "theme": theme if theme in THEMES else None,
    }
    return HTMLResponse(templates.get_template(template).render(shared | values), status)


def current_run(request: Request, site: Site) -> int | None:
    """The run that a page is about, whether or not its address names one; the navigation leads to pages about the same run."""
    shown: int | None = getattr(request.state, "run", None)
    return run_of(request) or shown or site.number


def run_of(request: Request) -> int | None:
    """The run that the address names; the links of the page keep it."""
    given = request.query_params.get("run", "")
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 10 else None


def _here(request: Request, pages: Any, homes: Mapping[str, str]) -> str:
    """The id of the page of the navigation that this address belongs to."""
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    below = [one for one in pages if path == one.path or (one.path != "/" and path.startswith(f"{one.path}/"))]
    return str(max(below, key=lambda one: len(one.path)).id) if below else homes.get(path, "")
