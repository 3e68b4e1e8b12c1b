"""Find an image by its id, its place, its URL, a text, or a picture that looks like it."""

from __future__ import annotations

import re
from collections import OrderedDict
from email.parser import BytesParser
from email.policy import HTTP
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from lodeset.infra.dashboard import decoding, render
from lodeset.infra.dashboard.chosen import TheData, data_of
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.links import Links, TheLinks
from lodeset.infra.dashboard.pages.image import near
from lodeset.infra.dashboard.pages.pictures import ImageId
from lodeset.infra.dashboard.selection import Selection
from lodeset.infra.dashboard.vectors import MOST_PIXELS, Floats, embedded, vectors_of
from lodeset.infra.dashboard.views import view
from lodeset.infra.looking.lookup import SHORTEST, meant
from lodeset.pipeline.algorithms.images.decoding import ID_HEX_DIGITS, image_id

router = APIRouter()

MOST = 200  # images that the beginning of an id may stand for
RESULTS = 60
UPLOADS = 32  # whose results stay
UPLOAD_BYTES = 20 * 2**20
FORM_BYTES = 2**16  # of the form around a picture
SIDE = 512  # of the picture beside the results
_HEX = re.compile(rf"[0-9a-f]{{{SHORTEST},{ID_HEX_DIGITS}}}")


@router.get("/search")
def search(
    request: Request, links: TheLinks, data: TheData, q: Annotated[str, Query(max_length=2000)] = ""
) -> Response:
    """Leads to what a text stands for."""
    asked = q.strip()
    if not asked:
        return _page(request)
    found = _found(data, asked)
    if len(found) == 1:
        return RedirectResponse(links.to(f"/image/{found[0]}"), status_code=303)
    if found:
        return _to(links, Selection(image_id=tuple(found)))
    by_text = Selection(text=asked)
    condition, values = by_text.condition()
    if data.rows(f"SELECT 1 FROM inspected WHERE {condition} LIMIT 1", values):
        return _to(links, by_text)
    known = meant(data.store, data.inspected.held.artifacts, asked, (), files=False)
    if len(known.ids) == 1:
        return RedirectResponse(links.to(f"/image/{known.ids[0]}"), status_code=303)
    return _page(request, asked, rejects=list(known.rejects)[:RESULTS])


@router.post("/search")
async def upload(request: Request, links: TheLinks) -> Response:
    """Searches by an uploaded picture: the body is the picture itself, or a form with it."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > UPLOAD_BYTES + FORM_BYTES:
            raise _too_large()
    return await run_in_threadpool(_searched, request, links, bytes(body))


def _too_large() -> HTTPException:
    return HTTPException(413, f"The picture is larger than {UPLOAD_BYTES // 2**20} MiB.")


@router.get("/search/image/{image_id}.webp")
def uploaded(request: Request, image_id: ImageId) -> Response:
    """The uploaded picture, re-encoded."""
    known = _uploads(request).get(image_id)
    if known is None:
        raise HTTPException(404, "This picture is gone.")
    return Response(known[1], media_type="image/webp")


@router.get("/search/image/{image_id}")
def by_image(request: Request, links: TheLinks, data: TheData, image_id: ImageId) -> Response:
    """The images that are most similar to an uploaded one."""
    known = _uploads(request).get(image_id)
    if known is None:
        return _page(request, problem="The results of this picture are gone. Choose it again.")
    vector, _ = known
    thumbs = near(links, data, vectors_of(data).nearest(vector, RESULTS))
    return _page(request, thumbs=thumbs, picture=links.to(f"/search/image/{image_id}.webp"), rejects=[])


def _searched(request: Request, links: Links, body: bytes) -> Response:
    picture = _picture(body, request.headers.get("content-type", ""))
    if not picture:
        raise HTTPException(422, "Choose a picture first.")
    if len(picture) > UPLOAD_BYTES:
        raise _too_large()
    data = data_of(request, links.run)
    name = image_id(picture)
    if data.rows_of(name):
        return RedirectResponse(links.to(f"/image/{name}"), status_code=303)
    limit = min(MOST_PIXELS, links.site.opened.config.ingest.max_pixels)
    small = decoding.small(picture, SIDE, limit)
    uploads = _uploads(request)
    uploads[name] = (embedded(links.site.opened, data, picture), small)
    while len(uploads) > UPLOADS:
        uploads.popitem(last=False)
    return RedirectResponse(links.to(f"/search/image/{name}"), status_code=303)


def _uploads(request: Request) -> OrderedDict[str, tuple[Floats, bytes]]:
    """image_id -> vector and picture of what was uploaded last; in memory, and never in the store."""
    state = request.app.state
    if not hasattr(state, "uploads"):
        state.uploads = OrderedDict()
    found: OrderedDict[str, tuple[Floats, bytes]] = state.uploads
    return found


def _picture(body: bytes, kind: str) -> bytes:
    """The picture in the body of a request."""
    if not kind.lower().startswith("multipart/form-data"):
        return body
    head = f"Content-Type: {' '.join(kind.split())}\r\n\r\n".encode("latin-1", "replace")
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    if message.is_multipart():
        for part in message.iter_parts():
            if part.get_param("name", header="content-disposition") == "picture":
                found = part.get_payload(decode=True)
                return found if isinstance(found, bytes) else b""
    return b""


def _found(data: Data, asked: str) -> list[str]:
    """The images that an id, the beginning of one, a place or a URL stands for exactly."""
    text = asked.lower()
    if _HEX.fullmatch(text) and (ids := data.beginning(text, MOST)):
        return ids
    at = "uri = ? OR member = ? OR url = ? OR concat(uri, '/', member) = ? OR concat(uri, '#', member) = ?"
    rows = data.rows(
        f"SELECT DISTINCT image_id FROM inspected WHERE {at} OR ends_with(uri, ?) OR ends_with(member, ?) LIMIT {MOST}",
        [asked] * 5 + ["/" + asked.lstrip("./")] * 2,
    )
    return sorted(row["image_id"] for row in rows)


def _to(links: Links, selection: Selection) -> Response:
    return RedirectResponse(view(links.site, "/images", selection, run=links.run), status_code=303)


def _page(request: Request, asked: str = "", **values: object) -> Response:
    given: dict[str, Any] = {"thumbs": [], "picture": "", "problem": "", "rejects": None, **values}
    return render.page(request, "search.html.jinja", asked=asked, limit=UPLOAD_BYTES // 2**20, **given)
