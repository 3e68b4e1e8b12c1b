"""What each curated set asked of the pool and got, query by query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Query, Request
from markupsafe import Markup
from starlette.responses import RedirectResponse, Response

from lodeset.infra.dashboard import render, retrieval
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.gallery import Thumb, thumb_of
from lodeset.infra.dashboard.pages.export import Format, download
from lodeset.infra.dashboard.retrieval import Hit
from lodeset.infra.dashboard.selection import by_ids, rows_by_ids
from lodeset.infra.dashboard.site import Site, TheSite, number_of
from lodeset.infra.report import charts, words
from lodeset.pipeline.algorithms.images.decoding import ID_HEX_DIGITS
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Artifact
from lodeset.pipeline.specs import RetrieveDetails

router = APIRouter()

PAGE, STRIP = 12, 8  # queries on a page, and hits of each
HITS = 120  # on the page of a query
EXPORTED = 10**6  # and in a file
BESIDE = 18  # images of a cluster that were not drawn
BINS = 20

RunNumber = Annotated[int | None, Query(ge=1)]
ImageId = Annotated[str, Path(pattern=rf"^[0-9a-f]{{{ID_HEX_DIGITS}}}$")]
_SHOWN = ("image_id", "set", "outcome", "label", "cluster", "picture_row")
_MARKS = {
    "taken": "keeper",
    "collision": "dropped",
    "given away": "dropped",
    "not selected": "dropped",
    "listed": "keeper",
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A curated set as the list of sets shows it."""

    name: str
    mode: str
    queries: int | None
    details: RetrieveDetails
    dropped: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A query with the first of its hits."""

    query: Thumb
    query_id: str
    hits: Sequence[Thumb]
    found: int


@router.get("/retrieval")
def retrieval_(
    request: Request,
    site: TheSite,
    data: TheData,
    run: RunNumber = None,
    set_: Annotated[str, Query(alias="set")] = "",
    start: Annotated[int, Query(ge=0)] = 0,
    query: str = "",
) -> Response:
    """All sets, and the queries of one of them. `query` leads to the page of that image."""
    sets = retrieval.sets(data)
    name = set_ or next(iter(sets), "")
    asked = [_asked(data, artifact) for artifact in sets.values()]
    values: dict[str, Any] = {"number": number_of(data), "asked": asked, "name": name}
    if not sets:
        return render.page(
            request, "retrieval.html.jinja", **values, has_shards=data.artifact("retrieve/all") is not None
        )
    chosen = retrieval.artifact_of(data, name)
    if query:
        return RedirectResponse(render.address(site, f"/retrieval/{name}/{query.strip().lower()}", run=run), 303)
    ids, total = retrieval.queries(data, name, start, PAGE) if chosen.stage == "retrieve" else ([], 0)
    return render.page(
        request,
        "retrieval.html.jinja",
        **values,
        one=next(one for one in asked if one.name == name),
        balanced=chosen.stage == "balance",
        histogram=_histogram(data, name),
        shared=retrieval.shared(data),
        strips=_strips(site, data, name, ids, run),
        total=total,
        start=start,
        size=PAGE,
    )


@router.get("/retrieval/{name}/{query_id}")
def query(
    request: Request, site: TheSite, data: TheData, name: str, query_id: ImageId, run: RunNumber = None
) -> Response:
    """One query: what it found, and what became of each."""
    artifact = retrieval.artifact_of(data, name)
    found, hits = retrieval.hits(data, name, [query_id], HITS)[query_id]
    rows = _rows(data, [query_id, *(hit.image_id for hit in hits)])
    if query_id not in rows:
        raise HTTPException(404, f"Run {number_of(data)} has no image {query_id}.")
    image = rows[query_id]
    clusters = sorted({rows[hit.image_id]["cluster"] for hit in hits if hit.image_id in rows} - {None})
    by_cluster = artifact.config.get("mode") == "cluster"
    beside = _not_drawn(site, data, clusters[0], run) if by_cluster and len(clusters) == 1 else None
    return render.page(
        request,
        "query.html.jinja",
        number=number_of(data),
        name=name,
        query_id=query_id,
        image=thumb_of(site, image, run=run, outcome="", mark="chosen"),
        row=image,
        one=_asked(data, artifact),
        config=artifact.config,
        found=found,
        states={state: sum(hit.state == state for hit in hits) for state in dict.fromkeys(hit.state for hit in hits)},
        hits=_thumbs(site, rows, name, hits, run),
        shown=HITS,
        cluster=clusters[0] if by_cluster and len(clusters) == 1 else None,
        beside=beside,
        export_href=lambda format_: render.address(
            site, f"/retrieval/{name}/{query_id}/export", run=run, format=format_
        ),
    )


@router.get("/retrieval/{name}/{query_id}/export")
def exported(
    site: TheSite, data: TheData, name: str, query_id: ImageId, run: RunNumber = None, format_: Format = "ids"
) -> Response:
    """All images that a query found as a file, whatever became of them."""
    retrieval.artifact_of(data, name)
    _, hits = retrieval.hits(data, name, [query_id], EXPORTED)[query_id]
    link = render.address(site, f"/retrieval/{name}/{query_id}", run=run)
    return download(data, rows_by_ids(data, [hit.image_id for hit in hits]), format_, link)


def _asked(data: Data, artifact: Artifact) -> Asked:
    embedded = data.artifact(f"embed/{artifact.set}")
    details = read_as(RetrieveDetails, artifact.details)
    balanced = artifact.stage == "balance"
    return Asked(
        name=artifact.set,
        mode="balanced draw" if balanced else words.asks(artifact.config),
        queries=None if balanced else details.queries or (embedded.rows.kept if embedded is not None else None),
        details=details,
        dropped=artifact.rows.dropped,
    )


def _histogram(data: Data, name: str) -> Markup:
    counts = retrieval.similarities(data, name, BINS)
    bars = [
        (charts.number(round(low, 2)) if n % 4 == 0 else "", float(count)) for n, (low, _, count) in enumerate(counts)
    ]
    return charts.bar_chart(bars, "cosine with the query", "images", width=620)


def _rows(data: Data, ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    return {row["image_id"]: row for row in by_ids(data, ids, _SHOWN)}


def _strips(site: Site, data: Data, name: str, ids: Sequence[str], run: int | None) -> list[Strip]:
    found = retrieval.hits(data, name, ids, STRIP)
    shown = [hit for query_id in ids for hit in found[query_id][1]]
    rows = _rows(data, [*ids, *(hit.image_id for hit in shown)])
    return [
        Strip(
            query=thumb_of(site, rows[query_id], run=run, outcome="", caption="query", mark="chosen"),
            query_id=query_id,
            hits=[_thumb(site, rows, hit, run) for hit in found[query_id][1] if hit.image_id in rows],
            found=found[query_id][0],
        )
        for query_id in ids
        if query_id in rows
    ]


def _thumbs(
    site: Site, rows: Mapping[str, Mapping[str, Any]], name: str, hits: Sequence[Hit], run: int | None
) -> list[tuple[Thumb, Hit, str]]:
    """Hits with the address of the query that has them instead."""
    return [
        (
            _thumb(site, rows, hit, run),
            hit,
            render.address(site, f"/retrieval/{name}/{hit.by}", run=run) if hit.state == "collision" else "",
        )
        for hit in hits
        if hit.image_id in rows
    ]


def _thumb(site: Site, rows: Mapping[str, Mapping[str, Any]], hit: Hit, run: int | None) -> Thumb:
    similarity = "" if hit.similarity is None else f" · {hit.similarity:.3f}"
    state = "" if hit.state == "taken" else f" · {hit.state}"
    return thumb_of(
        site,
        rows[hit.image_id],
        run=run,
        outcome="",
        caption=f"{hit.rank}{similarity}{state}",
        mark=_MARKS[hit.state],
    )


def _not_drawn(site: Site, data: Data, cluster: int, run: int | None) -> tuple[int, list[Thumb]]:
    """Images of a matching cluster that nobody selected: how many, and those nearest to its centroid."""
    where = "FROM by_cluster WHERE cluster = ? AND outcome = 'not_selected'"
    total = data.rows(f"SELECT count(*) AS n {where}", [cluster])[0]["n"]
    rows = data.rows(f"SELECT * {where} ORDER BY centroid_similarity DESC, image_id LIMIT {BESIDE}", [cluster])
    return total, [thumb_of(site, row, run=run, outcome="") for row in rows]
