"""Downloads of a selection."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from lodeset.infra.dashboard import exporting
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.selection import rows
from lodeset.infra.dashboard.site import TheSite, number_of
from lodeset.infra.dashboard.views import selection_of, view

router = APIRouter()

Format = Annotated[Literal["ids", "csv", "parquet", "fiftyone"], Query(alias="format")]


@router.get("/export")
def export(
    request: Request,
    site: TheSite,
    data: TheData,
    format_: Format = "ids",
    name: Annotated[str, Query(max_length=80)] = "",
) -> Response:
    """The images of a selection as a file."""
    selection = selection_of(request)
    return download(data, rows(data, selection), format_, view(site, "/images", selection, run=number_of(data)), name)


def download(data: Data, found: exporting.Rows, format_: Format, link: str, name: str = "") -> Response:
    """The images of these rows, which rise, as a file; `link` leads to the page that shows them."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or f"run-{number_of(data)}-images"
    if format_ == "ids":
        return _file(
            StreamingResponse(_begun(exporting.list_of_ids(data, found, link)), media_type="text/plain; charset=utf-8"),
            f"{stem}.txt",
        )
    make, kind, end = exporting.FORMATS[format_]
    return _file(StreamingResponse(_begun(make(data, found)), media_type=kind), f"{stem}.{end}")


def _begun(pieces: Iterator[str] | Iterator[bytes]) -> Iterator[str | bytes]:
    """The pieces, of which the first is made before an answer begins: what fails until then is told on a page."""
    return chain(list(islice(pieces, 1)), pieces)


def _file(answer: Response, name: str) -> Response:
    answer.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return answer
