"""The pictures of images: the stored thumbnails, and larger ones made from the sources. Always WebP, whatever the image was."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from lodeset.infra.dashboard import decoding
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.site import Site, TheSite
from lodeset.pipeline.algorithms.images.decoding import ID_HEX_DIGITS
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.stages.inspect.graph import SIDE
from lodeset.pipeline.tables.forgotten import forgotten

router = APIRouter()

ImageId = Annotated[str, Path(pattern=rf"^[0-9a-f]{{{ID_HEX_DIGITS}}}$")]
LIST_S = 1.0  # between two looks at the list of forgotten images
GONE = "this image was deleted"


@router.get("/thumb/{image_id}.webp")
def thumb(request: Request, site: TheSite, data: TheData, image_id: ImageId) -> Response:
    """The thumbnail of an image; where none was made, one from the source."""

    def make() -> bytes:
        return _stored(data, image_id) or _from_source(site, data, image_id, SIDE)

    return _answer(request, site, image_id, SIDE, make)


@router.get("/picture/{image_id}.webp")
def picture(
    request: Request,
    site: TheSite,
    data: TheData,
    image_id: ImageId,
    side: Annotated[int, Query(ge=16, le=4096)] = 1024,
) -> Response:
    """The image as its source has it, at most `side` pixels a side."""
    return _answer(request, site, image_id, side, lambda: _from_source(site, data, image_id, side))


def _stored(data: Data, image_id: str) -> bytes | None:
    rows = data.rows_of(image_id)
    files, numbers = data.column("picture_file"), data.column("picture_row")
    for row in rows:
        if files[row] >= 0:  # NaN where none was made
            found = data.thumbnail(int(files[row]), int(numbers[row]))
            if found is not None:
                return found
    return None


def _from_source(site: Site, data: Data, image_id: str, side: int) -> bytes:
    return decoding.small(source_bytes(site, data, image_id), side, site.opened.config.ingest.max_pixels)


def _answer(request: Request, site: Site, image_id: str, side: int, make: Callable[[], bytes]) -> Response:
    """A picture, which the browser keeps and asks about each time that it shows it: it may have been deleted since."""
    if image_id in listed(site.opened.store):
        return Response(decoding.placeholder(GONE, min(side, 640)), status_code=410, media_type="image/webp")
    tag = f'"{image_id}-{side}"'  # an image_id says which bytes it names
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    try:
        return Response(make(), media_type="image/webp", headers=headers)
    except (LodesetError, OSError) as error:
        # A picture and no error, so that a gallery with it stays whole; asked for again, it may be there.
        told = decoding.placeholder(str(error) if side > SIDE else "not in its source", min(side, 640))
        return Response(told, media_type="image/webp")


def source_bytes(site: Site, data: Data, image_id: str) -> bytes:
    """The bytes of an image from its source.

    Raises:
        LodesetError: the run does not know it, it was forgotten, or the source is gone.
    """
    known = data.rows('SELECT uri, member, "offset", size_bytes FROM inspected WHERE image_id = ?', [image_id])
    if not known or image_id in listed(site.opened.store):
        raise LodesetError("no image of this run")
    problem = ""
    for row in known:
        try:
            return _read(image_id, row)
        except (LodesetError, OSError) as error:
            problem = problem or str(error)
    raise LodesetError(f"the source is gone or has changed: {problem}")


def _read(image_id: str, row: dict[str, Any]) -> bytes:
    if row["uri"] is None:
        raise LodesetError("this image was made of another one, and no source holds it")
    place = Location(image_id, row["uri"], row["member"] or "", row["offset"] or 0, row["size_bytes"])
    return next(found for _, found in read_images([place]))


_LISTING = threading.Lock()
_LISTED: WeakKeyDictionary[Store, tuple[float, frozenset[str]]] = WeakKeyDictionary()


def listed(store: Store) -> frozenset[str]:
    """The forgotten images, as the store listed them at most LIST_S ago."""
    with _LISTING:
        when, found = _LISTED.get(store, (-LIST_S, frozenset()))
        if time.monotonic() - when >= LIST_S:
            found = forgotten(store)
            _LISTED[store] = time.monotonic(), found
        return found
