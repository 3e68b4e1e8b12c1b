"""Write the report as a file: collect, read the pictures, fill the templates of the sections, and join them to one
page.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from lodeset.infra.report import charts, words
from lodeset.infra.report.collect import absent_stages, collect, matching
from lodeset.infra.report.contents import Report
from lodeset.infra.report.header import tiles
from lodeset.infra.report.pictures import Picture, load
from lodeset.infra.report.pruned import drawn, report_of, smallest_k
from lodeset.infra.report.section import Contents, Finished, Section
from lodeset.infra.report.sections import SECTIONS
from lodeset.pipeline.dag.stage import Stage, read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.references import resolved
from lodeset.pipeline.shown import shown
from lodeset.pipeline.specs import Listed

TEMPLATE, PRUNED = "page.html.jinja", "pruned.html.jinja"
# How templates write numbers.
FILTERS = {
    "count": words.count,
    "compact": words.compact,
    "percent": words.percent,
    "size": words.size,
    "duration": words.duration,
    "short": charts.number,
    "date": words.date,
    "tree": words.tree,
}


def write_report(
    store: Store,
    stages: Mapping[str, Stage],
    artifacts: Mapping[str, Artifact],
    path: Path,
    title: str,
    beside: Beside | None = None,
) -> Path:
    """Write one self-contained HTML file, and return its path.

    `stages` is the whole graph and `artifacts` are the finished stages, both by stage id; sections without an artifact
    say so. The same store gives the same bytes. Sources that no longer exist leave placeholders with the reason.

    Raises:
        LodesetError: a file that a manifest lists is missing in the store, or `path` cannot be written.
    """
    return save(page_of(store, stages, artifacts, title, beside), path)


def page_of(
    store: Store,
    stages: Mapping[str, Stage],
    artifacts: Mapping[str, Artifact],
    title: str,
    beside: Beside | None = None,
) -> str:
    """The page of `write_report` as text.

    Raises:
        LodesetError: a file that a manifest lists is missing in the store.
    """
    report = collect(store, stages, artifacts)
    finished = Finished(store=store, stages=stages, artifacts=artifacts, report=report)
    sections = collected(finished)
    if beside is not None:
        sections.insert(1, _collected(beside.section, finished))
    found = load(store, artifacts, pictured(sections), _max_pixels(stages))
    if beside is not None:
        gone = [image_id for image_id, picture in found.items() if not picture.sets]
        found |= load(store, beside.artifacts, gone, _max_pixels(stages))
    return render(report, sections, found, title)


@dataclass(frozen=True)
class Beside:
    """A section about another run, which comes after the funnel, and the artifacts of that run."""

    section: Section
    artifacts: Mapping[str, Artifact]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A section, its unfinished stages, and its contents if any of its stages is finished."""

    section: Section
    absent: str
    contents: Contents | None


def collected(finished: Finished) -> list[Collected]:
    """The contents of each of `SECTIONS` for these stages.

    Raises:
        LodesetError: a file that a manifest lists is missing in the store.
    """
    return [_collected(resolved(name), finished) for name in SECTIONS]


def _collected(section: Section, finished: Finished) -> Collected:
    needs = section.needs
    absent = absent_stages(finished.stages, finished.artifacts, needs) if needs else ""
    available = not needs or bool(matching(finished.artifacts, needs))
    return Collected(section=section, absent=absent, contents=section.collect(finished) if available else None)


def pictured(sections: Sequence[Collected]) -> list[str]:
    """The image_ids of the pictures on the page, each once."""
    return list(
        dict.fromkeys(image_id for section in sections if section.contents for image_id in section.contents.pictures)
    )


def write_pruned(job: Mapping[str, Any], read: Callable[[str], bytes | None], path: Path, title: str) -> Path:
    """Write a page about a single pruning job; `read` returns the bytes of a file that its report names.

    Raises:
        LodesetError: `path` cannot be written.
    """
    template = environment("lodeset.infra.report").get_template(PRUNED)
    return save(template.render(title=title, jobs=[drawn(report_of(job), read)], smallest_k=smallest_k), path)


def save(page: str, path: Path) -> Path:
    """Write a page, completely or not at all.

    Raises:
        LodesetError: `path` cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise LodesetError(f"the page cannot be written to {path} ({error.strerror}): choose another path") from error
    return path


def harmless(value: Any) -> Any:
    """Make text from outside safe for a page: without credentials, and without characters that reorder text."""
    return shown(value, lines=True) if type(value) is str and not value.startswith("data:") else value


def environment(package: str, folder: str = "") -> Environment:
    """The templates that lie in a folder of a package: everything is escaped, and a name that is not given is an error."""
    templates = resources.files(package).joinpath(folder)
    made = Environment(
        loader=FunctionLoader(lambda name: templates.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=harmless,
        auto_reload=False,
    )
    made.filters |= FILTERS
    return made


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A section as the page shows it."""

    id: str
    title: str
    absent: str
    body: Markup


def render(report: Report, sections: Sequence[Collected], found: Mapping[str, Picture], title: str) -> str:
    """The page; `found` holds the pictures by image_id."""
    templates = environment("lodeset.infra.report")

    def body(collected_section: Collected) -> Markup:
        if collected_section.contents is None:
            return Markup("")
        template = templates.from_string(collected_section.section.template)
        return Markup(template.render(report=report, pictures=found, **collected_section.contents.values))

    shown = [
        Shown(id=part.section.id, title=part.section.title, absent=part.absent, body=body(part)) for part in sections
    ]
    page = templates.get_template(TEMPLATE)
    return page.render(title=title, report=report, tiles=tiles(report), sections=shown)


def _max_pixels(stages: Mapping[str, Stage]) -> int:
    limits = (read_as(Listed, stage.config).max_pixels for stage in stages.values() if stage.name == "ingest")
    return max((int(limit) for limit in limits), default=0) or 1
