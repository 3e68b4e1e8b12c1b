"""The definition of a section of the report; `sections/` contains and lists them."""

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
    """The input of the sections.

    Attributes:
        stages: the whole graph, by stage id (such as "ingest/pool").
        artifacts: the finished stages, by stage id.
        report: the contents of the header and of several sections.
    """

    store: Store
    stages: Mapping[str, Stage]
    artifacts: Mapping[str, Artifact]
    report: Report


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The contents of one section: the variables of its template, and the image_ids of the pictures that the template
    places with the macro `picture`.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the page.

    Attributes:
        id: its anchor in the page. title: its heading, and its entry in the table of contents. needs: ids of stages, or
        patterns of them ("ingest/pool", "retrieve/*"). The page names those that are not finished, and
            leaves out the section's body if none is finished.
        collect: reads the contents of the section from the store. Raises LodesetError if a file that a manifest lists
        is missing. template: Jinja source of the body. In addition to the variables of `collect`, it sees `report` and
        `pictures`.
    """

    id: str
    title: str
    collect: Callable[[Finished], Contents]
    template: str
    needs: Sequence[str] = ()


def stored(name: str) -> str:
    """The source of a template in the folder `sections`."""
    return resources.files("lodeset.infra.report").joinpath("sections", name).read_text(encoding="utf-8")
