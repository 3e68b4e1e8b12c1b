"""What a section of the report is; `sections/` holds them, and lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from lodeset.infra.report.contents import Report
from lodeset.pipeline.dag.stage import Stage
from lodeset.pipeline.dag.store import Artifact, Store


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What sections are made from.

    Attributes:
        stages: the whole graph, by stage id (such as "ingest/pool").
        artifacts: what of it is finished, by stage id.
        report: what the header and several sections show.
    """

    store: Store
    stages: Mapping[str, Stage]
    artifacts: Mapping[str, Artifact]
    report: Report


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What one section shows: the variables of its template, and the image_ids of the pictures that the template places with the macro
    `picture`."""

    values: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the page.

    Attributes:
        id: its anchor in the page.
        title: its heading, and its entry in the table of contents.
        needs: ids of stages, or patterns of them ("ingest/pool", "retrieve/*"). The page says which of them are not finished, and leaves
            the section's body out while none is.
        collect: reads what the section shows from the store. Raises LodesetError where the store lacks a file that a manifest lists.
        template: Jinja source of the body. Besides the variables that `collect` gives it sees `report` and `pictures`.
    """

    id: str
    title: str
    collect: Callable[[Finished], Contents]
    template: str
    needs: Sequence[str] = ()


def stored(name: str) -> str:
    """The source of a template that lies in the folder `sections`."""
    return resources.files("lodeset.infra.report").joinpath("sections", name).read_text(encoding="utf-8")
