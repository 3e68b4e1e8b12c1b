"""A selection as a list by hand: the images that it names, the file, the patch of the configuration, and what the next run costs."""

from __future__ import annotations

import itertools
import shlex
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import Response

from lodeset.infra.config import Config
from lodeset.infra.dashboard import exporting, render
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.gallery import thumb_of
from lodeset.infra.dashboard.links import Links, TheLinks
from lodeset.infra.dashboard.pages.commit import Priced, attached, options_of, priced, unpriced, warnings_of
from lodeset.infra.dashboard.pages.duplicates import Card
from lodeset.infra.dashboard.patches import PatchError, extended, unified
from lodeset.infra.dashboard.regrouped import Moved, regrouped
from lodeset.infra.dashboard.rereading import FileNow, reread
from lodeset.infra.dashboard.selection import Selection, page, rows
from lodeset.infra.dashboard.site import number_of
from lodeset.infra.dashboard.views import conditions, hidden, selection_of, view
from lodeset.infra.session import Opened
from lodeset.pipeline.by_hand import BY_HAND, ByHand
from lodeset.pipeline.config import CuratedSet
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.filters.config import BLOCKED_DOMAIN, BLOCKED_URL

router = APIRouter()

SIZE = 60
POOL = "pool"
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,59}$"
As = Literal["drop", "keep", "curated"]
Use = Annotated[As, Query(alias="as")]
Name = Annotated[str | None, Query(pattern=NAME)]

IN_SHARDS = ("in_shard", "selected")
KEPT = (*IN_SHARDS, "kept", "not_selected")
UNDECIDED = ("not_embedded", "embedded")  # the run ended before dedup


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a list can be for. `changes` says what becomes of the images that it changes something for."""

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
        "keeps. Which images it finds, and which shards they go into, retrieval decides in that run: this page cannot tell.",
        changes="kept by dedup and in no shard until now, so they go in",
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
    file = reread(site.opened)
    free = _free_name(site.opened, file, data, as_)
    name = name or free
    found = page(data, selection, "image_id", (page_ - 1) * SIZE, SIZE) if selection is not None else None
    more = {"run": run, "as": as_, "name": name}
    text, problem = _patch(file, as_, name)
    warnings = warnings_of(links, data, file)
    if _list_path(site.opened, name).exists():
        warnings.append(
            f"There is a file {_place(name)} beside {file.name}: the first command below would overwrite it. {free} is free."
        )
    outcomes = _outcomes(data, selection) if selection is not None else []

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
        changing=sum(count for outcome, count in outcomes if not unchanged(as_, outcome)),
        reasons=_unchanged(as_, outcomes),
        moved=_moved(links, data, selection, as_) if selection is not None else [],
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
        plan=_priced(site.opened, file, data, asked, as_, name) if priced_ and selection is not None else None,
        move=shlex.join(["install", "-D", f"{name}.txt", str(_list_path(site.opened, name))]),
        apply=shlex.join(["patch", str(site.opened.path), f"{name}.patch"]),
        options=options_of(site.opened, ""),
        warnings=warnings,
        file=file.name,
    )


@router.get("/commit/list/ids.txt")
def ids(request: Request, links: TheLinks, data: TheData, as_: Use = "drop", name: Name = None) -> Response:
    """The list as a file."""
    selection = _pool_only(request)
    link = view(links.site, "/commit/list", selection, run=number_of(data), **{"as": as_})
    text = "".join(exporting.list_of_ids(data, rows(data, selection), link))
    name = name or _free_name(links.site.opened, reread(links.site.opened), data, as_)
    return Response(text, media_type="text/plain; charset=utf-8", headers=attached(f"{name}.txt"))


@router.get("/commit/list/configuration.patch")
def configuration(links: TheLinks, data: TheData, as_: Use = "drop", name: Name = None) -> Response:
    """The patch that names the list in the configuration."""
    file = reread(links.site.opened)
    name = name or _free_name(links.site.opened, file, data, as_)
    text, problem = _patch(file, as_, name)
    if problem:
        raise HTTPException(409, problem)
    return Response(text, media_type="text/x-diff", headers=attached(f"{name}.patch"))


@router.get("/commit/list/plan")
def plan(request: Request, links: TheLinks, data: TheData, as_: Use = "drop", name: Name = None) -> Response:
    """What the next run would do with the list: a part of the page."""
    file = reread(links.site.opened)
    name = name or _free_name(links.site.opened, file, data, as_)
    found = _priced(links.site.opened, file, data, selection_of(request), as_, name)
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


def _free_name(opened: Opened, file: FileNow, data: Data, as_: As) -> str:
    """The first name that neither the configuration nor a file beside it has."""
    first = f"run-{number_of(data) or 0}-{as_}"
    taken = _set_names(file)
    names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    return next(
        name
        for name in names
        if not (_place(name) in (file.text or "") or name in taken or _list_path(opened, name).exists())
    )


def _place(name: str) -> str:
    return f"lists/{name}.txt"


def _list_path(opened: Opened, name: str) -> Path:
    return opened.path.parent / _place(name)


def _set_names(file: FileNow) -> frozenset[str]:
    """The names that no further curated set can have."""
    named = file.config.named_sets if file.config is not None else ()
    return frozenset(("pool", "all", *(one.name for one in named)))


def _count(data: Data, selection: Selection) -> int:
    return page(data, selection, size=1).total


def _outcomes(data: Data, selection: Selection) -> list[tuple[str, int]]:
    """How many images of a selection have which outcome, the most frequent first."""
    names, codes = data.codes("outcome")
    found = codes[rows(data, selection)]
    counts = {names[code]: int((found == code).sum()) for code in set(found.tolist())}
    return sorted(counts.items(), key=lambda one: (-one[1], one[0]))


def unchanged(as_: As, outcome: str) -> str:
    """Why a list changes nothing for images of this outcome; empty if it does."""
    if outcome in UNDECIDED:
        return "not decided on in this run, which ended before"
    if as_ == "drop":
        if outcome == "not_selected":
            return "not selected anyway, so they leave no shard"
        return "" if outcome in KEPT else "dropped anyway"
    if as_ == "curated":
        if outcome in IN_SHARDS:
            return "in the shards already"
        return "" if outcome in KEPT else "dropped: the set searches by them, and they do not come back"
    if outcome in IN_SHARDS:
        return "kept already"
    if outcome in KEPT:
        return "kept by dedup already: retrieval decides whether they go into shards"
    return NEVER_KEPT.get(outcome, "")


# What by_hand.keep does not overrule -> why.
NEVER_KEPT: Mapping[str, str] = {
    "reference": "dropped because of a reference set, which comes first",
    "no_vector": "without a vector: they cannot be embedded",
    BY_HAND: "on a list of by_hand.drop: a run refuses images that are on both, so take them off that list first",
    **dict.fromkeys((BLOCKED_DOMAIN, BLOCKED_URL), "dropped because their address is blocked, which comes first"),
}


def _unchanged(as_: As, outcomes: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """For how many images a list changes nothing, by the reason."""
    found: Counter[str] = Counter()
    for outcome, count in outcomes:
        found[unchanged(as_, outcome)] += count
    return [(why, count) for why, count in found.most_common() if why]


@dataclass(frozen=True, kw_only=True)
class Side:
    """Images that the list does not name, and that dedup decides otherwise about because of it: `count` of them, the first as cards."""

    title: str
    told: str
    count: int
    cards: list[Card]


def _moved(links: Links, data: Data, selection: Selection, as_: As) -> list[Side]:
    """The copies of listed images that come back, and those that leave; a curated set changes nothing in dedup."""
    if as_ == "curated":
        return []
    found = regrouped(data, data.image_ids(rows(data, selection)), drop=as_ == "drop")
    sides = (
        ("Come back", "Each image beside the one that was kept in its place until now.", found.back),
        ("Leave", "Each image beside the one that is kept instead.", found.leave),
    )
    return [
        Side(title=title, told=told, count=len(those), cards=[_card(links, one) for one in those[:SIZE]])
        for title, told, those in sides
    ]


def _card(links: Links, one: Moved) -> Card:
    # Copies may be linked through others, so the two have no pair of their own to show.
    return Card(
        left=links.thumb(one.image_id), right=links.thumb(one.other), href=links.to(f"/image/{one.image_id}"), text=""
    )


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


def _patch(file: FileNow, as_: As, name: str) -> tuple[str, str]:
    """The patch, and why there is none."""
    if file.text is None:
        return "", file.problem
    if as_ == "curated" and name in _set_names(file):
        return "", f"{file.name} has a set {name} already, or the name is reserved: give the new set another name."
    path, item = _item(as_, name)
    try:
        return unified(file.text, extended(file.text, path, item), file.name), ""
    except PatchError as error:
        return "", str(error)
    except ConfigError as error:
        return "", f"{file.name} is no valid configuration now: {error}"


def _priced(opened: Opened, file: FileNow, data: Data, asked: Selection, as_: As, name: str) -> Priced:
    """The plan with the list, which lies in a folder of its own meanwhile: what counts are its image_ids."""
    selection = _of_pool(asked)
    if selection is None:
        return Priced(None, "The list is empty.")
    if file.config is None:
        return unpriced(file)
    with tempfile.TemporaryDirectory(prefix="lodeset-list-") as folder:
        listed = Path(folder) / f"{name}.txt"
        listed.write_text("".join(exporting.list_of_ids(data, rows(data, selection), "")), encoding="utf-8")
        return priced(opened, _with(file.config, as_, name, str(listed)))


def _with(config: Config, as_: As, name: str, place: str) -> Config:
    if as_ == "curated":
        made = CuratedSet.model_validate({**_item(as_, name)[1], "pool_ids": place})
        return config.model_copy(update={"curated": (*config.curated, made)})
    now = config.by_hand or ByHand()
    return config.model_copy(update={"by_hand": now.model_copy(update={as_: (*getattr(now, as_), place)})})
