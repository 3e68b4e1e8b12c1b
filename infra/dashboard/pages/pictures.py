"""The pictures of images: the stored thumbnails, and larger ones made from the sources. Always WebP, whatever the image was."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from lodeset.infra.dashboard import decoding
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.site import Site, TheSite
from lodeset.pipeline.algorithms.images.decoding import ID_HEX_DIGITS
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.stages.inspect.graph import SIDE
from lodeset.pipeline.tables.forgotten import forgotten

router = APIRouter()

ImageId = Annotated[str, Path(pattern=rf"^[0-9a-f]{{{ID_HEX_DIGITS}}}$")]
FOREVER = "private, max-age=31536000, immutable"  # an image_id says which bytes it names


@router.get("/thumb/{image_id}.webp")
def thumb(site: TheSite, data: TheData, image_id: ImageId) -> Response:
    """The thumbnail of an image; where none was made, one from the source."""
    rows = data.rows_of(image_id)
    files, numbers = data.column("picture_file"), data.column("picture_row")
    for row in rows:
        if files[row] >= 0:  # NaN where none was made
            found = data.thumbnail(int(files[row]), int(numbers[row]))
            if found is not None:
                return _webp(found)
    return _from_source(site, data, image_id, SIDE)


@router.get("/picture/{image_id}.webp")
def picture(
    site: TheSite, data: TheData, image_id: ImageId, side: Annotated[int, Query(ge=16, le=4096)] = 1024
) -> Response:
    """The image as its source has it, at most `side` pixels a side."""
    return _from_source(site, data, image_id, side)


def _from_source(site: Site, data: Data, image_id: str, side: int) -> Response:
    try:
        return _webp(decoding.small(source_bytes(site, data, image_id), side, site.opened.config.ingest.max_pixels))
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
    if not known or image_id in forgotten(site.opened.store):
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


def _webp(found: bytes) -> Response:
    return Response(found, media_type="image/webp", headers={"Cache-Control": FOREVER})
