"""The images of a selection, a page at a time, and what tells them apart."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from lodeset.infra.dashboard import render
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.gallery import Thumb, thumb_of
from lodeset.infra.dashboard.selection import ORDERS, page
from lodeset.infra.dashboard.site import Site, TheSite
from lodeset.infra.dashboard.views import conditions, facets, hidden, selection_of, view

router = APIRouter()

SIZE = 60  # images of a page
_DETAILS = {
    "centroid_similarity": "centroid {:.3f}",
    "query_similarity": "query {:.3f}",
    "matched_similarity": "keeper {:.3f}",
    "filter_score": "score {:.4g}",
    "sharpness": "sharpness {:.3g}",
}

RunNumber = Annotated[int | None, Query(ge=1)]


@router.get("/images")
def images(
    request: Request,
    site: TheSite,
    data: TheData,
    run: RunNumber = None,
    order: str = "image_id",
    page_: Annotated[int, Query(alias="page", ge=1, le=10**8)] = 1,
    position: Annotated[int | None, Query(ge=1, le=10**10)] = None,
) -> Response:
    """`position` is the number of an image in the order, instead of that of a page."""
    selection = selection_of(request)
    number = (position - 1) // SIZE + 1 if position is not None else page_
    found = page(data, selection, order, (number - 1) * SIZE, SIZE)
    pages = max(1, -(-found.total // SIZE))
    more = {"run": run, "order": order if order != "image_id" else None}

    def at(other: int) -> str | None:
        return view(site, "/images", selection, page=other, **more) if 1 <= other <= pages and other != number else None

    return render.page(
        request,
        "images.html.jinja",
        selection=selection,
        found=found,
        thumbs=[thumb(site, row, order, run) for row in found.images],
        facets=facets(data, site, "/images", selection, **more),
        conditions=conditions(site, "/images", selection, **more),
        orders=list(ORDERS),
        order=order,
        number=number,
        page_count=pages,
        first=at(1),
        before=at(number - 1),
        after=at(number + 1),
        last=at(pages),
        searched=hidden(selection, run, "text"),
        kept=hidden(selection, run),
        all_href=render.address(site, "/images", run=run),
        map_href=view(site, "/map", selection, run=run),
        export_href=lambda format_: view(site, "/export", selection, run=run, format=format_),
        list_href=lambda as_: view(site, "/commit/list", selection, run=run, **{"as": as_}),
    )


def thumb(site: Site, row: Any, order: str, run: int | None) -> Thumb:
    """A row of a gallery, with the number that it is ordered by."""
    column = ORDERS[order].removesuffix(" DESC")
    value = row.get(column)
    if column == "width * height" and row["width"]:
        caption = f"{row['width']:,} x {row['height']:,}"
    else:
        caption = _DETAILS[column].format(value) if column in _DETAILS and value is not None else ""
    return thumb_of(site, row, run=run, caption=caption or (row["label"] or ""))
