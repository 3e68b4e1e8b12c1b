"""Near-duplicates: the pairs around the line that decides, what another value would change, groups, leaks, and the evidence of a pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import pyarrow as pa
from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import Response

from lodeset.infra.dashboard import close_looks, decoding, overlays, render
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.gallery import Thumb
from lodeset.infra.dashboard.groups import CERTAINTY, ORDERS, Groups, Link, chain, groups
from lodeset.infra.dashboard.lines import MEANINGS, Line, change, line
from lodeset.infra.dashboard.links import Links, TheLinks
from lodeset.infra.dashboard.pages.export import Format, download
from lodeset.infra.dashboard.pages.pictures import source_bytes
from lodeset.infra.dashboard.selection import Selection, by_ids, rows_by_ids
from lodeset.infra.dashboard.selection import page as page_of
from lodeset.infra.report.preview import parted
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import DedupSpec

router = APIRouter()

SHOWN = 60  # joins next to the line whose images are listed
PICTURED = 24  # of these images
PAIRS = 12  # on either side of the line
GROUPS, MEMBERS = 10, 11  # groups on a page, and images of each besides the keeper
LINKS = 200  # direct links that the page of a group lists
LEAKS = 30

ImageId = Annotated[str, Query(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str | None, Query(max_length=40)]
Value = Annotated[float | None, Query(allow_inf_nan=False)]
Start = Annotated[int, Query(ge=0, le=10**9)]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Two images side by side, a line below, and the page with their evidence."""

    left: Thumb
    right: Thumb
    href: str
    text: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Member:
    """An image of a group. `how`: keeper, direct, through or reference; `href`: the evidence of the pair with its keeper."""

    thumb: Thumb
    how: str
    limit: float | None = None
    href: str = ""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A group: its size, the value up to which it holds together, and images of it, the keeper first."""

    id: str
    size: int
    weakest: float | None
    members: tuple[Member, ...]
    more: int
    links: tuple[Link, ...]


# -- the line


@router.get("/duplicates")
def duplicates(request: Request, links: TheLinks, data: TheData, setting: Name = None, value: Value = None) -> Response:
    """A setting as a slider, and what lies around its value."""
    found = line(data, setting)
    settings = data.dedup.settings if data.dedup is not None else ()
    values = _tried(links, data, found, value) if found is not None else {}
    return render.page(
        request,
        "duplicates.html.jinja",
        tab="line",
        found=found,
        settings=settings,
        meanings=MEANINGS,
        data=data,
        **values,
    )


@router.get("/duplicates/line")
def tried(request: Request, links: TheLinks, data: TheData, setting: Name = None, value: Value = None) -> Response:
    """The part of the page that changes with the slider."""
    found = line(data, setting)
    if found is None:
        raise HTTPException(404, "No setting of dedup can be tried in this run.")
    values = _tried(links, data, found, value)
    answer = render.page(request, "line.html.jinja", found=found, **values)
    answer.headers["HX-Replace-Url"] = links.to("/duplicates", setting=found.setting.name, value=values["value"])
    return answer


def _tried(links: Links, data: Data, found: Line, asked: float | None) -> dict[str, Any]:
    """What the templates show of a value."""
    value, setting = found.value(asked), found.setting
    changed = change(data, setting.name, value, SHOWN)
    linked, apart = found.nearest(value, PAIRS)
    return {
        "value": value,
        "now": found.counts(setting.now),
        "then": found.counts(value),
        "moved": found.moved(value),
        "changed": changed,
        "leaving": changed_cards(links, found, changed.side(True).slice(0, PICTURED)),
        "returning": changed_cards(links, found, changed.side(False).slice(0, PICTURED)),
        "left": changed.side(True).num_rows,
        "came": changed.side(False).num_rows,
        "linked": [_card(links, pair.a, pair.b, _number(pair.limit)) for pair in linked],
        "apart": [_card(links, pair.a, pair.b, _number(pair.limit)) for pair in apart],
        "histogram": _histogram(found, value),
    }


WIDTH, HEIGHT = 800, 100


def _histogram(found: Line, value: float) -> dict[str, Any]:
    """The bars of `Line.bars` on a drawing of WIDTH x HEIGHT, their heights logarithmic, and where the two values are."""
    bars, setting = found.bars(), found.setting
    low, span = bars[0].low, bars[-1].high - bars[0].low
    tallest = max(math.log1p(bar.count) for bar in bars) or 1.0

    def x(at: float) -> float:
        return round(WIDTH * (at - low) / span, 2)

    drawn = []
    for bar in bars:
        height = round(0.96 * HEIGHT * math.log1p(bar.count) / tallest, 2)
        linked = setting.position((bar.low + bar.high) / 2) >= setting.position(value)
        drawn.append(
            {
                "x": x(bar.low), "y": HEIGHT - height, "width": round(0.88 * (x(bar.high) - x(bar.low)), 2), "height": height,
                "kind": "in" if linked else "out", "told": f"{bar.low:.3g} to {bar.high:.3g}: {bar.count:,}",
            }
        )  # fmt: skip
    return {"bars": drawn, "now": x(setting.now), "value": x(value)}


def changed_cards(links: Links, found: Line, table: pa.Table) -> list[Card]:
    """Rows of `what_if.DIFFERENCE`, each image beside the one that it is a copy of, now or then."""
    sign = 1 if found.setting.falls else -1
    cards = []
    for row in table.to_pylist():
        when = "after" if row["kept_before"] else "before"
        match = row[f"keeper_{when}"] or row["image_id"]
        note = "reference leak" if row[f"reason_{when}"] == "reference" else ""
        cards.append(_card(links, row["image_id"], match, _number(sign * row["limit"]), note))
    return cards


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _card(links: Links, a: str, b: str, text: str, note: str = "") -> Card:
    return Card(left=links.thumb(a), right=links.thumb(b), href=links.pair(a, b), text=text, note=note)


# -- groups


@router.get("/duplicates/groups")
def all_groups(
    request: Request,
    links: TheLinks,
    data: TheData,
    order: Annotated[str, Query(max_length=40)] = CERTAINTY,
    start: Start = 0,
) -> Response:
    """The groups, a page at a time."""
    if order not in ORDERS:
        raise HTTPException(422, f"order={order}: choose one of {', '.join(ORDERS)}.")
    found = groups(data)
    shown: list[Shown] = []
    total = 0
    if found is not None:
        rows = found.ordered(order)
        total = len(rows)
        numbers = found.number[rows[start : start + GROUPS]].tolist()
        shown = _groups(links, data, found, numbers, MEMBERS)
    return render.page(
        request, "groups.html.jinja", tab="groups", found=found, shown=shown, total=total, start=start, order=order,
        orders=ORDERS, before=links.to("/duplicates/groups", order=order, start=max(0, start - GROUPS)) if start else None,
        after=links.to("/duplicates/groups", order=order, start=start + GROUPS) if start + GROUPS < total else None,
    )  # fmt: skip


@router.get("/duplicates/group")
def one_group(request: Request, links: TheLinks, data: TheData, of: ImageId) -> Response:
    """All images of the group of an image, and all its direct links."""
    found, number = _group_of(data, of)
    (shown,) = _groups(links, data, found, [number], 500)
    return render.page(
        request, "group.html.jinja", tab="groups", found=found, shown=shown, evidence=links.pair, most=LINKS,
        export_href=lambda format_: links.to("/duplicates/group/export", of=of, format=format_),
    )  # fmt: skip


@router.get("/duplicates/group/export")
def exported_group(links: TheLinks, data: TheData, of: ImageId, format_: Format = "ids") -> Response:
    """All images of a group as a file, those of reference sets among them."""
    found, number = _group_of(data, of)
    return download(data, rows_by_ids(data, found.of(number)), format_, links.to("/duplicates/group", of=of))


def _group_of(data: Data, image_id: str) -> tuple[Groups, int]:
    """The groups, and the number of an image that is in one of them."""
    found = groups(data)
    number = data.dedup.node(image_id) if data.dedup is not None else None
    if found is None or number is None or len(found.of(number)) < 2:
        raise HTTPException(404, f"Image {image_id} is in no group of near-duplicates.")
    return found, number


def _groups(links: Links, data: Data, found: Groups, numbers: Sequence[int], most: int) -> list[Shown]:
    """Groups with their keepers and up to `most` others, those with the least certain links first."""
    members = {number: found.of(number) for number in numbers}
    rows = {row["image_id"]: row for row in by_ids(data, [one for some in members.values() for one in some])}
    shown = []
    for number, ids in members.items():
        direct_links = found.links(number)
        direct = {frozenset((one.a, one.b)): one for one in direct_links}
        told = [_member(links, rows[one], data.sets, direct) for one in ids if one in rows]
        told.sort(
            key=lambda one: (("keeper", "reference", "through", "direct").index(one.how), _order(one.limit, found))
        )
        kept = sum(one.how == "keeper" for one in told)
        weakest = min(
            (one.limit for one in direct_links if one.limit is not None), key=lambda v: _order(v, found), default=None
        )
        at = _row_of(found, number)
        if at is not None:
            position = float(found.weakest[at])
            sign = 1 if found.line is None or found.line.setting.falls else -1
            weakest = sign * position if math.isfinite(position) else None
        cut = told[: max(kept, 1) + most]
        shown.append(
            Shown(
                id=found.ids[int(found.group[number])],
                size=len(ids),
                weakest=weakest,
                members=tuple(cut),
                more=len(told) - len(cut),
                links=tuple(direct_links),
            )
        )
    return shown


def _row_of(found: Groups, number: int) -> int | None:
    at = int(found.number.searchsorted(found.group[number]))
    return at if at < len(found.number) and found.number[at] == found.group[number] else None


def _order(limit: float | None, found: Groups) -> float:
    if limit is None:
        return math.inf
    return limit if found.line is None or found.line.setting.falls else -limit


def _member(
    links: Links, row: Mapping[str, Any], sets: Mapping[str, str], direct: Mapping[frozenset[str], Link]
) -> Member:
    image_id, keeper = row["image_id"], row["matched_id"]
    if row["dropped_by"] != "dedup":
        if sets.get(row["set"]) == "reference":
            return Member(thumb=links.thumb_of(row, mark="leak"), how="reference")
        return Member(thumb=links.thumb_of(row, mark="keeper"), how="keeper")
    link = direct.get(frozenset((image_id, keeper)))
    return Member(
        thumb=links.thumb_of(row, mark="dropped"),
        how="direct" if link is not None else "through",
        limit=link.limit if link is not None else None,
        href=links.pair(keeper, image_id) if keeper else "",
    )


# -- leaks


@router.get("/duplicates/leaks")
def leaks(request: Request, links: TheLinks, data: TheData, start: Start = 0) -> Response:
    """Images of the pool that reference sets drop, each beside the reference image that it is a copy of."""
    asked = Selection(outcome=("reference",), dropped_by=("dedup",))
    found = page_of(data, asked, "least like its keeper", start, LEAKS)
    linked = groups(data)
    cards = []
    for row in found.images:
        image_id, keeper = row["image_id"], row["matched_id"] or row["image_id"]
        number = data.dedup.node(image_id) if data.dedup is not None else None
        direct = linked is not None and number is not None and _direct(linked, number, image_id, keeper)
        text = "direct" if direct else "linked through others"
        cards.append(
            Card(
                left=links.thumb(image_id, mark="leak"),
                right=links.thumb(keeper),
                href=links.pair(keeper, image_id),
                text=text,
            )
        )
    return render.page(
        request, "leaks.html.jinja", tab="leaks", cards=cards, found=found, references=[n for n, role in data.sets.items() if role == "reference"],
        deduplicated=linked is not None,
    )  # fmt: skip


def _direct(found: Groups, number: int, a: str, b: str) -> bool:
    return any({one.a, one.b} == {a, b} for one in found.links(number))


# -- the evidence of a pair


@router.get("/duplicates/pair")
def pair(request: Request, links: TheLinks, data: TheData, a: ImageId, b: ImageId) -> Response:
    """Two images, how they were aligned, and what decided."""
    rows = {row["image_id"]: row for row in by_ids(data, [a, b])}
    missing = [one for one in (a, b) if one not in rows]
    if missing or a == b:
        raise HTTPException(404, f"No such pair of images in this run: {missing[0] if missing else 'name two images'}.")
    edge, found, dedup = data.edge(a, b), groups(data), data.dedup
    path: list[str] = []
    if dedup is not None and found is not None and not (edge and edge["linked"]):
        number, other = dedup.node(a), dedup.node(b)
        if number is not None and other is not None and found.group[number] == found.group[other]:
            path = chain(found.links(number), a, b)
    aligned = edge is not None and overlays.map_of(edge["map"], edge["transform"]) is not None
    return render.page(
        request, "pair.html.jinja", tab="groups", a=rows[a], b=rows[b], edge=edge, aligned=aligned, spec=dedup.spec if dedup else None,
        steps=_steps(edge, dedup.spec if dedup else None) if edge else [], path=[links.thumb(one) for one in path],
        steps_between=[links.pair(x, y) for x, y in pairwise(path)], grouped=bool(path) or bool(edge and edge["linked"]),
        unlimited=_is_infinite(edge),
    )  # fmt: skip


def _is_infinite(edge: Mapping[str, Any] | None) -> bool:
    return edge is not None and edge["min_score_limit"] is not None and math.isinf(edge["min_score_limit"])


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the comparison: what it found, and whether its finding stands."""

    name: str
    found: str
    decided: bool


def _steps(edge: Mapping[str, Any], spec: DedupSpec | None) -> list[Step]:
    """What each step of dedup found, and which decided."""
    if spec is None or spec.verify != "pixels":
        return [
            Step(
                name="Vectors and hashes", found="close enough" if edge["linked"] else "not close enough", decided=True
            )
        ]
    points, score = edge["points"], edge["score"]
    closely = points is not None and points > 0
    aligned = score is not None and not closely
    upright = score is None
    told = [
        Step(
            name="Thumbnails, as they are",
            found="they agree"
            if upright and edge["linked"]
            else "they do not agree"
            if upright
            else "they left it open",
            decided=upright,
        ),
        Step(
            name="Thumbnails, aligned",
            found=f"score {score:.2f}"
            if aligned
            else "no alignment was found"
            if upright
            else "full images were looked at",
            decided=aligned,
        ),
    ]
    if points is None:
        full = "not looked at"
    elif points == 0:
        full = "too few key points agree, so this says nothing"
    else:
        full = (
            f"{points} key points agree on one map, score {score:.2f}"
            if score is not None
            else f"{points} key points agree"
        )
    details = edge["detail_score"]
    apart = parted(edge, spec.min_detail_score)
    found = "not compared" if details is None else f"score {details:.2f}"
    steps = [*told, Step(name="Full images", found=full, decided=closely)]
    return [
        *(replace(step, decided=step.decided and not apart) for step in steps),
        Step(name="Details of full images", found=found, decided=apart),
    ]


@router.get("/duplicates/pair/{kind}.webp")
def picture(links: TheLinks, data: TheData, kind: overlays.Kind | close_looks.Kind, a: ImageId, b: ImageId) -> Response:
    """The second image placed on the first as dedup aligned them, or both side by side with what the close look saw."""
    edge = data.edge(a, b)
    if edge is None:
        raise HTTPException(404, "No pair of these images is stored.")
    stored: list[float] | None = None
    if kind == "points":
        shown, missing = bool(edge["points"]), "The run found no key points that agree in the full images of this pair."
    elif kind == "details":
        shown, missing = edge["detail_score"] is not None, "The run did not compare the details of this pair."
    else:
        stored = overlays.map_of(edge["map"], edge["transform"])
        shown, missing = stored is not None, "This pair was not aligned."
    if not shown:
        raise HTTPException(404, missing)
    most = links.site.opened.config.ingest.max_pixels
    try:
        first, second = (source_bytes(links.site, data, edge[end]) for end in ("image_id_a", "image_id_b"))
        if kind == "points" or kind == "details":
            made = close_looks.drawn(first, second, kind, most)
        else:
            assert stored is not None
            made = overlays.compared(first, second, stored, kind, most)
    except (LodesetError, OSError) as error:
        made = decoding.placeholder(str(error), overlays.SIDE)
    return Response(made, media_type="image/webp")
