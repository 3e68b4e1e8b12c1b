"""The map of all images: similar ones lie close together. What is drawn around on it is a selection."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, HTTPException, Path, Query, Request
from numpy.typing import NDArray
from starlette.responses import RedirectResponse, Response

from lodeset.infra.dashboard import density, render
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.gallery import thumb_of
from lodeset.infra.dashboard.selection import Selection, bitmask, page, rows
from lodeset.infra.dashboard.site import Site, TheSite
from lodeset.infra.dashboard.views import conditions, hidden, selection_of, view

router = APIRouter()

COLORS: Mapping[str, str] = {
    "outcome": "outcome",
    "set": "set",
    "cluster": "cluster",
    "label": "label",
    "dropped_by": "kept or dropped",
}
PALETTE = 12  # colors of the legend; the classes k0 to k11 of the style sheet, and k12 for all others
OTHERS = PALETTE
SHOWN = 24  # thumbnails beside the map
STEP = 0.25  # of the width or height, by which the map is moved

RunNumber = Annotated[int | None, Query(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the legend; `href` is the view with only these images, or with all again."""

    name: str
    color: int
    count: int
    chosen: bool
    href: str


@router.get("/map")
def map_(
    request: Request,
    site: TheSite,
    data: TheData,
    run: RunNumber = None,
    by: str = "outcome",
    box: str = "",
    left: float | None = None,
    right: float | None = None,
    bottom: float | None = None,
    top: float | None = None,
) -> Response:
    """`left` to `top` come from the form that selects a rectangle; `box` is the part of the map that is shown."""
    by = by if by in COLORS else "outcome"
    selection = selection_of(request)
    sides = (left, bottom, right, top)
    if None not in sides:
        area = density.box_of(",".join(f"{float(one or 0):.6f}" for one in sides))
        return RedirectResponse(
            view(site, "/map", _within(selection, area), run=run, by=by, box=box or None), status_code=303
        )
    placed = bool(np.isfinite(data.column("x")).any())
    all_of_it = density.whole(data)
    part = density.box_of(box) if box else all_of_it
    more = {"run": run, "by": by if by != "outcome" else None}
    return render.page(
        request,
        "map.html.jinja",
        placed=placed,
        by=by,
        colors=COLORS,
        box=part,
        box_text=density.text_of(part),
        whole_text=density.text_of(all_of_it),
        moves=_moves(site, selection, part, all_of_it, more),
        density_href=view(site, "/map/density.webp", selection, run=run, box=density.text_of(part)),
        legend=legend(data, site, selection, by, run, box),
        kept=hidden(selection.without("lasso"), run),
        box_given=box,
        area=part,
        mapped=int(np.isfinite(data.column("x")).sum()),
        **_selected(data, site, selection, more, box),
    )


@router.get("/map/selected")
def selected(
    request: Request, site: TheSite, data: TheData, run: RunNumber = None, by: str = "outcome", box: str = ""
) -> Response:
    """The gallery of what is selected, and the legend, for the page that is open."""
    by = by if by in COLORS else "outcome"
    selection = selection_of(request)
    more = {"run": run, "by": by if by != "outcome" else None}
    return render.page(
        request,
        "map_selected.html.jinja",
        legend=legend(data, site, selection, by, run, box),
        **_selected(data, site, selection, more, box),
    )


def _selected(data: Data, site: Site, selection: Selection, more: Mapping[str, Any], box: str) -> dict[str, Any]:
    found = page(data, selection, size=SHOWN)
    run = more["run"]
    return {
        "selection": selection,
        "found": found,
        "thumbs": [thumb_of(site, row, run=run) for row in found.images],
        "conditions": conditions(site, "/map", selection, **more, box=box or None),
        "all_href": render.address(site, "/map", **more, box=box or None),
        "images_href": view(site, "/images", selection, run=run),
        "export_href": lambda format_: view(site, "/export", selection, run=run, format=format_),
        "list_href": lambda as_: view(site, "/commit/list", selection, run=run, **{"as": as_}),
    }


@router.get("/map/density.webp")
def picture(request: Request, data: TheData, box: str = "") -> Response:
    """The map, or a part of it, as a picture."""
    area = density.box_of(box) if box else density.whole(data)
    found = density.picture(data, selection_of(request), area)
    return _answer(request, data, found, "image/webp")


@router.get("/map/columns/{name}.bin")
def column(request: Request, data: TheData, name: Annotated[str, Path(pattern="^[a-z_]{1,20}$")]) -> Response:
    """A column of `inspected` in the order of its rows: `x` and `y` as float32, what colors go by as uint8; little-endian."""
    if name in ("x", "y"):
        values: NDArray[Any] = data.column(name).astype("<f4")
    elif name in COLORS:
        values = coded(data, name)[1]
    else:
        raise HTTPException(404, "The map has no such column.")
    return _answer(request, data, values.tobytes(), "application/octet-stream")


@router.get("/map/mask.bin")
def mask(request: Request, data: TheData) -> Response:
    """Which rows a selection has: one bit for each, the first in the lowest bit of the first byte."""
    found = bitmask(rows(data, selection_of(request)), len(data.column("x")))
    return _answer(request, data, found, "application/octet-stream")


@router.get("/map/point/{row}")
def point(
    request: Request, site: TheSite, data: TheData, row: Annotated[int, Path(ge=0)], run: RunNumber = None
) -> Response:
    """The thumbnail of the image of a row."""
    known = data.rows("SELECT * FROM inspected WHERE row = ?", [row])
    if not known:
        raise HTTPException(404, "The run has no such row.")
    return render.page(request, "map_point.html.jinja", thumb=thumb_of(site, known[0], run=run), row=known[0])


def _answer(request: Request, data: Data, found: bytes, kind: str) -> Response:
    """With a tag, so that the browser loads it once for each run."""
    tag = f'"{hashlib.sha256(f"{data.inspected.artifact.fingerprint} {request.url.query}".encode()).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found, media_type=kind, headers=headers)


def coded(data: Data, by: str) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
    """The values that have a color of their own, and the number [N] of each row's (OTHERS: any other, or none).

    Clusters have no order, so their colors repeat: the number of a cluster says which.
    """
    if by == "cluster":
        number = data.column("cluster")
        known = np.isfinite(number.astype(np.float64))
        # A multiplicative hash, so that clusters of neighboring numbers differ.
        mixed = np.where(known, number, 0).astype(np.uint64) * np.uint64(2_654_435_761) >> np.uint64(7)
        return (), np.where(known, mixed % PALETTE, OTHERS).astype(np.uint8)
    values, codes = data.codes(by)
    counts = np.bincount(codes[codes >= 0], minlength=len(values))
    order = sorted(range(len(values)), key=lambda n: (-counts[n], values[n]))[:PALETTE]
    place = np.full(len(values) + 1, OTHERS, np.uint8)  # the last: null
    place[order] = np.arange(len(order), dtype=np.uint8)
    return tuple(values[n] for n in order), place[codes]


def legend(data: Data, site: Site, selection: Selection, by: str, run: int | None, box: str) -> list[Entry]:
    """What the colors mean, the most frequent first."""
    names, codes = coded(data, by)
    placed = np.isfinite(data.column("x"))
    counts = np.bincount(codes[placed], minlength=PALETTE + 1)
    asked, entries = getattr(selection, by), []
    for color, name in enumerate(names):
        if not counts[color]:
            continue
        chosen = name in asked
        parameters = {**_by_name(selection), by: [one for one in asked if one != name] if chosen else [*asked, name]}
        href = view(site, "/map", Selection.of(parameters), run=run, by=by, box=box or None) if name else ""
        entries.append(Entry(name=name or "kept", color=color, count=int(counts[color]), chosen=chosen, href=href))
    if counts[OTHERS]:
        entries.append(
            Entry(
                name="in no cluster" if by == "cluster" else "others",
                color=OTHERS,
                count=int(counts[OTHERS]),
                chosen=False,
                href="",
            )
        )
    return entries


def _by_name(selection: Selection) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in selection.parameters():
        found.setdefault(name, []).append(value)
    return found


def _within(selection: Selection, box: density.Box) -> Selection:
    left, bottom, right, top = box
    corners = ((left, bottom), (right, bottom), (right, top), (left, top))
    lasso = ";".join(f"{x:.6f},{y:.6f}" for x, y in corners)
    return Selection.of({**_by_name(selection), "lasso": [lasso]})


def _moves(
    site: Site, selection: Selection, box: density.Box, whole: density.Box, more: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """What moves the map without scripts: an id, a name, and the address."""
    left, bottom, right, top = box
    wide, high = right - left, top - bottom

    def at(x: float, y: float, scale: float = 1.0) -> str:
        half_wide, half_high = wide * scale / 2, high * scale / 2
        middle, level = (left + right) / 2 + x * wide, (bottom + top) / 2 + y * high
        part = (middle - half_wide, level - half_high, middle + half_wide, level + half_high)
        return view(site, "/map", selection, **more, box=density.text_of(part))

    return [
        ("in", "Zoom in", at(0, 0, 0.5)),
        ("out", "Zoom out", at(0, 0, 2.0)),
        ("west", "Move left", at(-STEP, 0)),
        ("east", "Move right", at(STEP, 0)),
        ("north", "Move up", at(0, STEP)),
        ("south", "Move down", at(0, -STEP)),
        ("whole", "Reset the map", view(site, "/map", selection, **more)),
    ]
