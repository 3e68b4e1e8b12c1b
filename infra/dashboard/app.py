"""The dashboard as an application: its pages, its static files, and what it says when something goes wrong."""

from __future__ import annotations

import functools
import shlex
import threading
from typing import Any

import duckdb
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from lodeset.infra.dashboard import chosen, render
from lodeset.infra.dashboard.pages import BELOW, PAGES
from lodeset.infra.dashboard.safety import Safety
from lodeset.infra.dashboard.site import Site
from lodeset.pipeline.errors import DamagedError, LodesetError


def create_app(site: Site) -> FastAPI:
    """The dashboard of a configuration. It reads the store and writes nothing."""
    templates = render.environment(site)
    app = FastAPI(title="lodeset", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.site, app.state.templates, app.state.runs = site, templates, chosen.Opened(site.data)
    app.state.differences, app.state.comparing = {}, threading.Lock()
    for one in PAGES:
        app.include_router(one.router)
    for router in BELOW:
        app.include_router(router)
    app.mount("/static", _Static(packages=[("lodeset.infra.dashboard", "static")]), name="static")
    for kind, told in _ERRORS.items():
        app.add_exception_handler(kind, told)
    app.add_middleware(Safety, site=site, refusal=functools.partial(render.refusal, templates))
    return app


class _Static(StaticFiles):
    def file_response(self, *arguments: Any, **options: Any) -> Response:
        answer = super().file_response(*arguments, **options)
        answer.headers["Cache-Control"] = "private, no-cache"  # ask each time whether it has changed
        return answer


def _refuse(request: Request, status: int, told: str) -> Response:
    return render.refusal(request.app.state.templates, request.scope, status, told)


async def _http(request: Request, error: Any) -> Response:
    told = "No page has this address." if error.status_code == 404 and error.detail == "Not Found" else error.detail
    return _refuse(request, error.status_code, str(told))


async def _invalid(request: Request, error: Any) -> Response:
    said = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()[:5])
    return _refuse(request, 422, f"The address has a wrong value. {said}")


async def _known(request: Request, error: Any) -> Response:
    return _refuse(request, 400, _sentence(error))


async def _nothing(request: Request, error: Any) -> Response:
    return render.page(request, "nothing.html.jinja", told=_sentence(error), absent=error.run)


async def _gone(request: Request, error: Any) -> Response:
    """A file that a page reads is gone: the image or the run was deleted while somebody looked at it."""
    site: Site = request.app.state.site
    run = render.run_of(request) or site.number
    words = ["lodeset", "inspect", str(site.opened.path), *(["--run", str(run)] if run else []), "--make-only"]
    return _refuse(
        request,
        503,
        f"What this page reads is no longer in the store: `{shlex.join(words)}` makes it again, then reload the page.",
    )


def _sentence(error: Exception) -> str:
    told = str(error)
    return f"{told[:1].upper()}{told[1:]}"


_ERRORS: dict[type[Exception], Any] = {
    HTTPException: _http,
    RequestValidationError: _invalid,
    chosen.NotInspectedError: _nothing,
    chosen.GoneError: _gone,
    DamagedError: _gone,
    FileNotFoundError: _gone,
    duckdb.IOException: _gone,
    duckdb.PermissionException: _gone,
    LodesetError: _known,
}
