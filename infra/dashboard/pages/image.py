"""One image: where it comes from, what became of it and why, its place among all others, and its nearest neighbors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from lodeset.infra.dashboard import density, render
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.gallery import Thumb, thumb_of
from lodeset.infra.dashboard.links import Links, TheLinks
from lodeset.infra.dashboard.pages.pictures import ImageId
from lodeset.infra.dashboard.selection import by_ids
from lodeset.infra.dashboard.site import number_of
from lodeset.infra.dashboard.vectors import NotYetError, vectors_of
from lodeset.infra.looking import looking
from lodeset.infra.looking.story import Traced
from lodeset.infra.report.pictures import short_name
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.errors import LodesetError

router = APIRouter()

NEIGHBORS = 24
# Reasons of dedup -> what the image is a copy of.
_COPIED = {"reference": "an image of a reference set", "included": "an image of an included set"}
AROUND = 0.12  # of the height of the map, to each side of the image


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A line about the image, with a link where there is more to see."""

    name: str
    value: str
    href: str = ""


@router.get("/image/{image_id}")
def image(request: Request, links: TheLinks, data: TheData, image_id: ImageId, story: bool = False) -> Response:
    """`story`: with what every stage says of it, which is otherwise loaded afterwards."""
    rows = data.rows("SELECT * FROM inspected WHERE image_id = ? ORDER BY set != 'pool', set", [image_id])
    if not rows:
        told = _traced(links, data, image_id)  # an earlier run may know it, or somebody had it taken down
        return render.page(request, "image.html.jinja", image_id=image_id, row=None, story=told)
    row = rows[0]
    return render.page(
        request,
        "image.html.jinja",
        image_id=image_id,
        row=row,
        sets=[one["set"] for one in rows],
        why=_why(row),
        sections=_sections(links, data, row),
        group=_group(links, data, row),
        group_href=links.to("/duplicates/group", of=row["image_id"]) if row["group_id"] else "",
        place=_place(links, row, data),
        picture=links.to(f"/picture/{image_id}.webp", side=1024),
        story=_traced(links, data, image_id) if story else None,
        story_href=links.to(f"/image/{image_id}/story"),
        neighbors_href=links.to(f"/image/{image_id}/neighbors"),
        list_href=lambda as_: links.to("/commit/list", image_id=image_id, **{"as": as_}),
    )


@router.get("/image/{image_id}/story")
def story(request: Request, links: TheLinks, data: TheData, image_id: ImageId) -> Response:
    """What every stage says of an image: a part of its page."""
    return render.page(request, "image_story.html.jinja", story=_traced(links, data, image_id))


@router.get("/image/{image_id}/neighbors")
def neighbors(request: Request, links: TheLinks, data: TheData, image_id: ImageId) -> Response:
    """The images that are most similar to one: a part of its page."""
    problem, again, thumbs = "", "", list[Thumb]()
    try:
        vectors, rows = vectors_of(data), data.rows_of(image_id)
        query = next((found for row in rows if (found := vectors.of_row(row)) is not None), None)
        if query is None:
            problem = "It has no vector in this run, so it cannot be compared."
        else:
            thumbs = near(links, data, vectors.nearest(query, NEIGHBORS, rows))
    except NotYetError:
        again = links.to(f"/image/{image_id}/neighbors")
    except LodesetError as error:
        problem = f"{str(error)[:1].upper()}{str(error)[1:]}."
    return render.page(request, "image_neighbors.html.jinja", thumbs=thumbs, problem=problem, again=again)


def near(links: Links, data: Data, found: list[tuple[int, float]]) -> list[Thumb]:
    """The thumbnails of rows with their cosines, each image once."""
    if not found:
        return []
    table = data.rows(f"SELECT * FROM inspected WHERE row IN ({', '.join(str(row) for row, _ in found)})")
    by_row = {row["row"]: row for row in table}
    thumbs, seen = list[Thumb](), set[str]()
    for number, similarity in found:
        row = by_row[number]
        if row["image_id"] not in seen:
            seen.add(row["image_id"])
            caption = f"{similarity:.3f}" + (f" · {row['set']}" if row["set"] != "pool" else "")
            thumbs.append(thumb_of(links.site, row, run=links.run, caption=caption))
    return thumbs


def _traced(links: Links, data: Data, image_id: str) -> Traced:
    try:
        return looking.trace(links.site.opened, image_id, number_of(data))
    except LodesetError as error:
        raise HTTPException(404, f"{str(error)[:1].upper()}{str(error)[1:]}") from None


def _why(row: Mapping[str, Any]) -> str:
    """Why the image is here or is not, in short."""
    outcome = row["outcome"]
    if row["dropped_by"] == "filter":
        limit = ""
        if row["filter_score"] is not None and row["filter_threshold"] is not None:
            limit = f" ({row['filter_score']:.4g}, where the limit is {row['filter_threshold']:.4g})"
        return "Dropped by hand" if outcome == "by_hand" else f"Dropped by the filter {outcome}{limit}"
    if row["dropped_by"] == "dedup":
        similarity = f", similarity {row['matched_similarity']:.3f}" if row["matched_similarity"] is not None else ""
        of = _COPIED.get(outcome, "another image of the pool")
        return f"Dropped by dedup as a copy of {of}{similarity}"
    wanted = f", selected for {', '.join(row['selected_for'])}" if row["selected_for"] else ""
    return {
        "in_shard": f"In {row['shard']}{wanted}",
        "selected": f"Selected{wanted.replace(', selected', '', 1)}; its shard is not written yet",
        "not_selected": "Kept by dedup, and selected by no curated set",
        "kept": "Kept by dedup; the selection is not made yet",
        "embedded": "Embedded; dedup has not judged it yet",
        "not_embedded": "Ingested; it is not embedded yet",
        "no_vector": "Dropped, because it could not be embedded",
    }.get(outcome, f"An image of the {outcome.removesuffix('_set')} set {row['set']}, not of the pool")


def _sections(links: Links, data: Data, row: Mapping[str, Any]) -> dict[str, list[Fact]]:
    """What is known of the image, by topic."""
    found = {
        "Source": [
            _fact("location", short_name(row["uri"], row["member"] or "") if row["uri"] else None),
            _fact("file", row["uri"]),
            _fact("offset", f"{row['offset']:,}" if row["offset"] else None),
            _fact("made from", row["derived_from"], links.to(f"/image/{row['derived_from']}")),
            _fact("size", f"{row['width']:,} x {row['height']:,}, {row['format']}, {row['size_bytes']:,} bytes"),
            _fact("sharpness", _number(row["sharpness"])),
            _fact("quality", _number(row["quality"])),
        ],
        "What the source says": [
            _fact("label", row["label"], links.to("/images", label=row["label"])),
            _fact("caption", row["caption"]),
            _fact("URL", row["url"]),
            _fact("license", row["licence"]),
        ],
        "Decisions": [
            _fact("filter score", _number(row["filter_score"])),
            _fact("filter limit", _number(row["filter_threshold"])),
            _fact("copy of", row["matched_id"], links.to(f"/image/{row['matched_id']}")),
            _fact("evidence", "the pair", links.pair(row["image_id"], row["matched_id"]))
            if row["matched_id"]
            else None,
            _fact("cluster", _number(row["cluster"]), links.to(f"/clusters/{row['cluster']}")),
            _fact("cosine with the centroid", _number(row["centroid_similarity"])),
            _fact("selected for", ", ".join(row["selected_for"] or ()) or None),
            _fact("found by", row["query_id"], links.to(f"/image/{row['query_id']}")),
            _fact("cosine with the query", _number(row["query_similarity"])),
        ],
        "Training": [
            _fact("shard", row["shard"], links.to("/images", shard=row["shard"])),
            _fact("offset in the shard", f"{row['shard_offset']:,}" if row["shard_offset"] is not None else None),
            _fact("seen by training", _seen(data) if row["shard"] else None),
        ],
    }
    return {title: facts for title, some in found.items() if (facts := [one for one in some if one is not None])}


def _fact(name: str, value: str | None, href: str = "") -> Fact | None:
    return Fact(name=name, value=value, href=href) if value else None


def _number(value: float | None) -> str | None:
    return f"{value:.4g}" if value is not None else None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training says of its images: how many there were, and how many it took, repeats counted."""

    images: int = 0
    images_seen: int = 0


def _seen(data: Data) -> str | None:
    """How often training saw an image of the shards: a range, since which images an epoch leaves out is not recorded."""
    trained = data.artifact("train/all")
    told = read_as(Trained, trained.details) if trained is not None else Trained()
    if trained is None or not told.images:
        return None
    images, seen = told.images, told.images_seen
    batch = int(trained.config.get("batch") or 0)
    average = f"{seen / images:.3g} times on average"
    if not batch or trained.config.get("weights"):
        return average
    epoch = images // batch * batch  # an epoch shows an image once, and leaves out what fills no batch
    most = math.ceil(seen / epoch) if epoch else 0
    least = seen // epoch if epoch == images else 0
    return f"{least} to {most} times, {average}" if least != most else f"{most} times"


def _group(links: Links, data: Data, row: Mapping[str, Any]) -> list[Thumb]:
    """The keeper of its group, and some of its copies."""
    if not row["group_id"]:
        return []
    some: list[Mapping[str, Any]] = [
        *data.rows(
            "SELECT * FROM inspected WHERE group_id = ? ORDER BY dropped_by = 'dedup', image_id LIMIT 12",
            [row["group_id"]],
        )
    ]
    if row["matched_id"] and row["matched_id"] not in {one["image_id"] for one in some}:
        some = [*by_ids(data, [row["matched_id"]]), *some]
    marks = {True: "dropped", False: "keeper"}
    return [
        links.thumb_of(
            one, mark="chosen" if one["image_id"] == row["image_id"] else marks[one["dropped_by"] == "dedup"]
        )
        for one in some
    ]


def _place(links: Links, row: Mapping[str, Any], data: Data) -> dict[str, str] | None:
    """The part of the map around the image."""
    if row["x"] is None or not math.isfinite(row["x"]):
        return None
    _, bottom, _, top = density.whole(data)
    high = AROUND * (top - bottom)
    wide = high * density.WIDTH / density.HEIGHT
    box = density.text_of((row["x"] - wide, row["y"] - high, row["x"] + wide, row["y"] + high))
    return {"map": links.to("/map", box=box), "picture": links.to("/map/density.webp", box=box)}
