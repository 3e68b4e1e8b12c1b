"""What the pages share that show a selection: its address, its counts, and the conditions that it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from fastapi import Request

from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.render import address
from lodeset.infra.dashboard.selection import Selection, chosen
from lodeset.infra.dashboard.site import Site

FACETS: Mapping[str, str] = {
    "outcome": "Outcome",
    "set": "Set",
    "dropped_by": "Dropped by",
    "selected_for": "Selected for",
    "label": "Label",
    "cluster": "Cluster",
}
FACET_VALUES = 12  # that a page lists of each
NAMES: Mapping[str, str] = {
    **FACETS,
    "shard": "Shard",
    "image_id": "Image",
    "group_id": "Group of",
    "query_id": "Found by",
    "text": "Text",
}


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value that a selection can ask for.

    Attributes:
        chosen: whether the selection asks for it.
        href: the view with it, or without it where it is chosen.
    """

    name: str
    count: int
    chosen: bool
    href: str


@dataclass(frozen=True, kw_only=True)
class Facet:
    """The most frequent values of a column among the images that meet all other conditions."""

    name: str
    title: str
    values: tuple[Value, ...]
    more: bool


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A condition of a selection, and the view without it."""

    title: str
    value: str
    href: str


def selection_of(request: Request) -> Selection:
    """The selection that an address names.

    Raises:
        LodesetError: a value cannot be what it says.
    """
    return Selection.of({name: request.query_params.getlist(name) for name in request.query_params})


def view(site: Site, path: str, selection: Selection, **more: Any) -> str:
    """The address of a page about a selection."""
    given: dict[str, list[str]] = {}
    for name, value in selection.parameters():
        given.setdefault(name, []).append(value)
    return address(site, path, **{**more, **given})


def conditions(site: Site, path: str, selection: Selection, **more: Any) -> list[Condition]:
    """What a selection asks for, one by one."""
    found = []
    for name, value in selection.parameters():
        title, told = ("Drawn on the map", "") if name == "lasso" else (NAMES[name], value)
        href = view(site, path, selection.without(name, value), **more)
        found.append(Condition(title=title, value=told.replace("_", " "), href=href))
    return found


def facets(data: Data, site: Site, path: str, selection: Selection, **more: Any) -> list[Facet]:
    """The facets that tell the images of a selection apart."""
    tables = {}
    within = chosen(data, selection)
    if within is not None:
        tables = {"lassoed": pa.table({"row": np.flatnonzero(within).astype(np.int32)})}
    found = []
    for name, title in FACETS.items():
        asked = tuple(str(one) for one in getattr(selection, name))
        condition, values = selection.without(name).condition()
        if tables:
            condition += " AND row IN (SELECT row FROM lassoed)"
        column = f"unnest({name})" if name == "selected_for" else name
        counted = data.query(
            f"SELECT value, count(*) AS n FROM (SELECT {column} AS value FROM inspected WHERE {condition}) "
            f"WHERE value IS NOT NULL AND value::VARCHAR != '' GROUP BY value ORDER BY n DESC, value LIMIT {FACET_VALUES + 1}",
            values,
            tables,
        ).to_pylist()
        counts = {str(row["value"]): int(row["n"]) for row in counted}
        listed = list(counts)[:FACET_VALUES] + [one for one in asked if one not in list(counts)[:FACET_VALUES]]
        if len(listed) < 2 and not asked:
            continue  # it tells nothing apart
        shown = tuple(
            Value(
                name=value,
                count=counts.get(value, 0),
                chosen=value in asked,
                href=view(
                    site,
                    path,
                    selection.without(name, value)
                    if value in asked
                    else Selection.of(_grouped([*selection.parameters(), (name, value)])),
                    **more,
                ),
            )
            for value in listed
        )
        found.append(Facet(name=name, title=title, values=shown, more=len(counts) > FACET_VALUES))
    return found


def _grouped(parameters: list[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in parameters:
        found.setdefault(name, []).append(value)
    return found


def hidden(selection: Selection, run: int | None, *without: str) -> list[tuple[str, str]]:
    """The parameters of a selection as the hidden fields of a form that asks for something else, too."""
    given = [(name, value) for name, value in selection.parameters() if name not in without]
    return [*given, *([("run", str(run))] if run is not None else [])]
