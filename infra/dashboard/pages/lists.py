"""A selection as a list by hand: the images that it names, the file, the patch of the configuration, and what the next run costs."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import Response

from lodeset.infra.config import Config
from lodeset.infra.dashboard import exporting, render
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.gallery import thumb_of
from lodeset.infra.dashboard.links import TheLinks
from lodeset.infra.dashboard.pages.commit import Priced, attached, options_of, priced, warnings_of
from lodeset.infra.dashboard.patches import PatchError, extended, unified
from lodeset.infra.dashboard.selection import Selection, page, rows
from lodeset.infra.dashboard.site import number_of
from lodeset.infra.dashboard.views import conditions, hidden, selection_of, view
from lodeset.infra.session import Opened
from lodeset.pipeline.by_hand import ByHand
from lodeset.pipeline.config import CuratedSet

router = APIRouter()

SIZE = 60
POOL = "pool"
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,59}$"
As = Literal["drop", "keep", "curated"]
Use = Annotated[As, Query(alias="as")]
Name = Annotated[str | None, Query(pattern=NAME)]

# Outcomes of images that go on to training, or would if they were asked for.
KEPT = ("in_shard", "selected", "kept", "embedded", "not_selected")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a list can be for. `changes` are the outcomes of images that it changes something for."""

    title: str
    told: str
    changes: str


KINDS: Mapping[As, Kind] = {
    "drop": Kind(
        title="Images to drop",
        told="The next run drops them before it looks for copies, with the reason by hand. If one of them was the keeper of its "
        "group, another image of the group is kept instead.",
        changes="kept until now, so they leave",
    ),
    "keep": Kind(
        title="Images to keep",
        told="No filter drops them, and dedup keeps each of them beside its copies. Blocked URLs and copies of reference images "
        "come first all the same.",
        changes="dropped until now, so they come back",
    ),
    "curated": Kind(
        title="A curated set",
        told="The next run searches the pool by them, as by the images of any other curated set, and takes in the ones that dedup "
        "keeps.",
        changes="in no shard until now",
    ),
}


@router.get("/commit/list")
def list_(
    request: Request,
    links: TheLinks,
    data: TheData,
    as_: Use = "drop",
    name: Name = None,
    page_: Annotated[int, Query(alias="page", ge=1, le=10**7)] = 1,
    priced_: Annotated[bool, Query(alias="priced")] = False,
) -> Response:
    """A selection of pool images as a list for the configuration."""
    site, run = links.site, links.run
    asked = selection_of(request)
    selection = _of_pool(asked)
    name = name or _name(data, as_)
    found = page(data, selection, "image_id", (page_ - 1) * SIZE, SIZE) if selection is not None else None
    more = {"run": run, "as": as_, "name": name}
    text, problem = _patch(site.opened, as_, name)
    outcomes = _outcomes(data, selection) if selection is not None else []
    changing = sum(count for outcome, count in outcomes if _changes(as_, outcome))

    def at(number: int) -> str | None:
        return view(site, "/commit/list", asked, **more, page=number) if found is not None and number > 0 else None

    return render.page(
        request,
        "list.html.jinja",
        kind=KINDS[as_],
        kinds=KINDS,
        as_=as_,
        name=name,
        name_pattern=NAME.strip("^$"),
        found=found,
        others=_count(data, asked) - (found.total if found is not None else 0),
        outcomes=outcomes,
        changing=changing,
        coming=_coming(data, selection) if as_ == "drop" and selection is not None else 0,
        thumbs=[thumb_of(site, row, run=run) for row in found.images] if found is not None else [],
        conditions=conditions(site, "/commit/list", asked, **more),
        all_href=view(site, "/images", Selection(), run=run),
        fields=hidden(asked, run),
        before=at(page_ - 1),
        after=at(page_ + 1) if found is not None and found.next is not None else None,
        diff=text.splitlines(),
        problem=problem,
        list_href=view(site, "/commit/list/ids.txt", asked, **more),
        patch_href=view(site, "/commit/list/configuration.patch", asked, **more),
        plan_href=view(site, "/commit/list/plan", asked, **more),
        priced_href=view(site, "/commit/list", asked, **more, priced="true"),
        plan=_priced(site.opened, data, asked, as_, name) if priced_ and selection is not None else None,
        move=shlex.join(["install", "-D", f"{name}.txt", str(site.opened.path.parent / _place(name))]),
        apply=shlex.join(["patch", str(site.opened.path), f"{name}.patch"]),
        options=options_of(site.opened, ""),
        warnings=warnings_of(links, data),
        file=site.opened.path.name,
    )


@router.get("/commit/list/ids.txt")
def ids(request: Request, links: TheLinks, data: TheData, as_: Use = "drop", name: Name = None) -> Response:
    """The list as a file."""
    selection = _pool_only(request)
    link = view(links.site, "/commit/list", selection, run=number_of(data), **{"as": as_})
    text = "".join(exporting.list_of_ids(data, selection, link))
    return Response(text, media_type="text/plain; charset=utf-8", headers=attached(f"{name or _name(data, as_)}.txt"))


@router.get("/commit/list/configuration.patch")
def configuration(links: TheLinks, data: TheData, as_: Use = "drop", name: Name = None) -> Response:
    """The patch that names the list in the configuration."""
    name = name or _name(data, as_)
    text, problem = _patch(links.site.opened, as_, name)
    if problem:
        raise HTTPException(409, problem)
    return Response(text, media_type="text/x-diff", headers=attached(f"{name}.patch"))


@router.get("/commit/list/plan")
def plan(request: Request, links: TheLinks, data: TheData, as_: Use = "drop", name: Name = None) -> Response:
    """What the next run would do with the list: a part of the page."""
    found = _priced(links.site.opened, data, selection_of(request), as_, name or _name(data, as_))
    return render.page(request, "plan.html.jinja", plan=found)


def _of_pool(selection: Selection) -> Selection | None:
    """Its images of the pool, which lists by hand are about; None if it asks for other sets alone."""
    if selection.set and POOL not in selection.set:
        return None
    return replace(selection, set=(POOL,))


def _pool_only(request: Request) -> Selection:
    selection = _of_pool(selection_of(request))
    if selection is None:
        raise HTTPException(404, "Lists by hand name images of the pool, and this selection has none.")
    return selection


def _name(data: Data, as_: As) -> str:
    return f"run-{number_of(data) or 0}-{as_}"


def _place(name: str) -> str:
    return f"lists/{name}.txt"


def _count(data: Data, selection: Selection) -> int:
    return page(data, selection, size=1).total


def _outcomes(data: Data, selection: Selection) -> list[tuple[str, int]]:
    """How many images of a selection have which outcome, the most frequent first."""
    names, codes = data.codes("outcome")
    found = codes[rows(data, selection)]
    counts = {names[code]: int((found == code).sum()) for code in set(found.tolist())}
    return sorted(counts.items(), key=lambda one: (-one[1], one[0]))


def _changes(as_: As, outcome: str) -> bool:
    if as_ == "curated":
        return outcome != "in_shard"
    return (outcome in KEPT) == (as_ == "drop")


def _coming(data: Data, selection: Selection) -> int:
    """How many images were dropped as copies of one that would be dropped, and are not in the selection themselves."""
    dropped = pa.array(data.image_ids(rows(data, selection)), pa.string())
    copies = data.query(
        "SELECT image_id, matched_id FROM inspected WHERE set = 'pool' AND dropped_by = 'dedup' AND matched_id IS NOT NULL"
    )
    left_alone = pc.invert(pc.is_in(copies["image_id"], dropped))
    return int(pc.sum(pc.and_(pc.is_in(copies["matched_id"], dropped), left_alone)).as_py() or 0)


def _item(as_: As, name: str) -> tuple[tuple[str, ...], Any]:
    """Where the configuration names a list, and how."""
    if as_ == "curated":
        return ("curated",), {
            "name": name,
            "pool_ids": _place(name),
            "include": True,
            "retrieve": {"mode": "sample", "k": 4},
        }
    return ("by_hand", as_), _place(name)


def _patch(opened: Opened, as_: As, name: str) -> tuple[str, str]:
    """The patch, and why there is none."""
    path, item = _item(as_, name)
    try:
        text = opened.path.read_bytes().decode("utf-8")
        return unified(text, extended(text, path, item), opened.path.name), ""
    except (OSError, UnicodeDecodeError) as error:
        return "", f"{opened.path.name} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
    except PatchError as error:
        return "", str(error)


def _priced(opened: Opened, data: Data, asked: Selection, as_: As, name: str) -> Priced:
    """The plan with the list, which lies in a folder of its own meanwhile: what counts are its image_ids."""
    selection = _of_pool(asked)
    if selection is None:
        return Priced(None, "The list is empty.")
    with tempfile.TemporaryDirectory(prefix="lodeset-list-") as folder:
        file = Path(folder) / f"{name}.txt"
        file.write_text("".join(exporting.list_of_ids(data, selection, "")), encoding="utf-8")
        return priced(opened, _with(opened.config, as_, name, str(file)))


def _with(config: Config, as_: As, name: str, place: str) -> Config:
    if as_ == "curated":
        made = CuratedSet.model_validate({**_item(as_, name)[1], "pool_ids": place})
        return config.model_copy(update={"curated": (*config.curated, made)})
    now = config.by_hand or ByHand()
    return config.model_copy(update={"by_hand": now.model_copy(update={as_: (*getattr(now, as_), place)})})
