"""The clusters of the pool: their sizes before and after selection, and what one of them holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fastapi import APIRouter, HTTPException, Path, Query, Request
from markupsafe import Markup
from numpy.typing import NDArray
from starlette.responses import Response

from lodeset.infra.dashboard import render
from lodeset.infra.dashboard.chosen import TheData
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.difference import RESULT
from lodeset.infra.dashboard.gallery import Thumb, thumb_of
from lodeset.infra.dashboard.selection import Selection, by_ids
from lodeset.infra.dashboard.site import Site, TheSite, number_of
from lodeset.infra.dashboard.views import view
from lodeset.infra.report import charts
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.specs import FitClustersDetails

router = APIRouter()

PAGE = 24  # clusters
SAMPLES = 5  # images of each in the list
SHOWN = 18  # images of one cluster nearest to its centroid, and farthest from it
NEIGHBORS, QUERIES, LABELS = 12, 24, 12
# Orders of the list, and what they sort by.
ORDERS: Mapping[str, str] = {
    "largest": "images DESC",
    "smallest": "images",
    "most selected": "selected DESC",
    "least selected share": "selected / images, images DESC",
    "largest selected share": "selected / images DESC, images DESC",
    "least alike": "similarity NULLS LAST",
    "most alike": "similarity DESC NULLS LAST",
    "number": "cluster",
}
_SIZES = f"""
SELECT cluster, count(*) AS images, count(*) FILTER (WHERE outcome IN {RESULT}) AS selected,
    avg(centroid_similarity) AS similarity
FROM inspected WHERE cluster IS NOT NULL GROUP BY cluster
"""
_OF_CLUSTER = """
SELECT outcome, label, selected_for, query_id, query_similarity, centroid_similarity FROM inspected WHERE cluster = ?
"""
_MEMBERS = """
SELECT * FROM (
    SELECT *, row_number() OVER (PARTITION BY cluster ORDER BY centroid_similarity DESC, image_id) AS place
    FROM by_cluster WHERE cluster IN ({marks})
) WHERE place <= {count} ORDER BY cluster, place
"""

RunNumber = Annotated[int | None, Query(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One cluster of the list.

    Attributes:
        images: those that dedup kept. selected: those of them that a set, or a balanced draw, chose.
        similarity: their mean cosine with the centroid; None if nobody measured it.
    """

    number: int
    images: int
    selected: int
    similarity: float | None
    samples: Sequence[Thumb] = ()


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of a cluster, and where to see it."""

    name: str
    images: int
    url: str


@router.get("/clusters")
def clusters(
    request: Request,
    site: TheSite,
    data: TheData,
    run: RunNumber = None,
    order: str = "largest",
    scale: Literal["linear", "log"] = "linear",
    start: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """All clusters, a page at a time."""
    if order not in ORDERS:
        raise HTTPException(422, f"order={order[:80]}: choose one of {', '.join(ORDERS)}")
    sizes = data.rows(f"SELECT * FROM ({_SIZES}) ORDER BY images DESC, cluster")
    page = data.rows(f"SELECT * FROM ({_SIZES}) ORDER BY {ORDERS[order]}, cluster LIMIT {PAGE} OFFSET {start}")
    samples = _samples(site, data, [row["cluster"] for row in page], run)
    fitted, balanced = data.artifact("fit_clusters/pool"), data.artifact("balance/pool")
    return render.page(
        request,
        "clusters.html.jinja",
        number=number_of(data),
        k=read_as(FitClustersDetails, fitted.details).k if fitted is not None else len(sizes),
        levels=read_as(FitClustersDetails, fitted.details).levels if fitted is not None else [],
        sizes=sizes,
        balanced=balanced.rows.kept if balanced is not None else None,
        chart=_chart(sizes, scale == "log"),
        scale=scale,
        order=order,
        orders=tuple(ORDERS),
        start=start,
        size=PAGE,
        shown=[
            Listed(
                number=row["cluster"],
                images=row["images"],
                selected=row["selected"],
                similarity=row["similarity"],
                samples=samples.get(row["cluster"], ()),
            )
            for row in page
        ],
    )


@router.get("/clusters/{cluster}")
def cluster(
    request: Request, site: TheSite, data: TheData, cluster: Annotated[int, Path(ge=0)], run: RunNumber = None
) -> Response:
    """One cluster: its images, what they are, who asked for them, and which clusters lie near."""
    members = data.query(_OF_CLUSTER, [cluster])
    levels = _levels(data)
    if not members.num_rows and not (levels and cluster < len(levels[0])):
        raise HTTPException(404, f"Run {number_of(data)} has no cluster {cluster}.")
    own = Listed(
        number=cluster,
        images=members.num_rows,
        selected=pc.sum(pc.is_in(members["outcome"], pa.array(RESULT))).as_py() or 0,
        similarity=pc.mean(members["centroid_similarity"]).as_py(),
    )
    at_ends = [
        data.rows(
            f"SELECT * FROM by_cluster WHERE cluster = ? ORDER BY centroid_similarity {way}, image_id LIMIT {count}",
            [cluster],
        )
        for way, count in (("DESC", SHOWN), ("", max(0, min(SHOWN, own.images - SHOWN))))
    ]
    return render.page(
        request,
        "cluster.html.jinja",
        number=number_of(data),
        own=own,
        path=_path(data, cluster),
        nearest=[_drawn(site, row, run) for row in at_ends[0]],
        farthest=[_drawn(site, row, run) for row in at_ends[1]],
        shown=SHOWN,
        neighbors=_neighbors(site, data, cluster, run),
        queries=_queries(site, data, members, run),
        parts=_parts(site, data, cluster, members, run),
        export_href=lambda format_: view(site, "/export", Selection(cluster=(cluster,)), run=run, format=format_),
        all_url=render.address(site, "/images") + "?" + Selection(cluster=(cluster,)).url(**_of(run)),
    )


def _of(run: int | None) -> dict[str, int]:
    return {"run": run} if run is not None else {}


def _drawn(site: Site, row: Mapping[str, Any], run: int | None) -> Thumb:
    similarity = row["centroid_similarity"]
    return thumb_of(
        site,
        row,
        run=run,
        caption="" if similarity is None else f"{similarity:.3f}",
        mark="keeper" if row["outcome"] in RESULT else "",
    )


def _samples(site: Site, data: Data, numbers: Sequence[int], run: int | None) -> dict[int, list[Thumb]]:
    """The images nearest to the centroid of each of these clusters."""
    if not numbers:
        return {}
    found: dict[int, list[Thumb]] = {}
    for row in data.rows(_MEMBERS.format(marks=", ".join("?" * len(numbers)), count=SAMPLES), list(numbers)):
        found.setdefault(row["cluster"], []).append(thumb_of(site, row, run=run, outcome=""))
    return found


# -- centroids


def _levels(data: Data) -> list[NDArray[np.float32]]:
    """The centroids of every level, the lowest first, left in their files until they are read."""
    fitted = data.artifact("fit_clusters/pool")
    if fitted is None:
        return []
    return [np.load(data.path_of(file), mmap_mode="r", allow_pickle=False) for file in fitted.tables["centroids"]]


def _path(data: Data, cluster: int) -> list[int]:
    """The numbers of the clusters above this one, the top level first; empty if there is one level."""
    levels = _levels(data)
    path, at = [], cluster
    for own, above in pairwise(levels):  # each centroid belongs to the nearest one of the level above
        at = int(np.argmin((above * above).sum(axis=1) - 2 * (above @ own[at])))
        path.append(at)
    return path[::-1]


def _neighbors(site: Site, data: Data, cluster: int, run: int | None) -> list[tuple[Listed, float]]:
    """The clusters whose centroids are most alike, with the cosines."""
    levels = _levels(data)
    if not levels or cluster >= len(levels[0]):
        return []
    lowest = levels[0]
    length = np.linalg.norm(lowest, axis=1)
    cosines = (lowest @ lowest[cluster]) / np.maximum(length * length[cluster], 1e-12)
    cosines[cluster] = -np.inf
    count = min(NEIGHBORS, len(lowest) - 1)
    nearest = np.argsort(-cosines, kind="stable")[:count].tolist()
    marks = ", ".join("?" * len(nearest))
    rows = data.rows(f"SELECT * FROM ({_SIZES}) WHERE cluster IN ({marks})", nearest) if nearest else []
    sizes = {row["cluster"]: row for row in rows}
    samples = _samples(site, data, nearest, run)
    found = []
    for other in nearest:
        row = sizes.get(other, {"images": 0, "selected": 0, "similarity": None})
        listed = Listed(
            number=other,
            images=row["images"],
            selected=row["selected"],
            similarity=row["similarity"],
            samples=samples.get(other, ()),
        )
        found.append((listed, float(cosines[other])))
    return found


# -- who asked, and what is in it


def _queries(site: Site, data: Data, members: pa.Table, run: int | None) -> list[tuple[Thumb, int]]:
    """The query images that chose most of a cluster, and how many they chose."""
    rows = data.query(
        "SELECT query_id, count(*) AS images FROM members WHERE query_id IS NOT NULL GROUP BY query_id "
        f"ORDER BY images DESC, query_id LIMIT {QUERIES}",
        tables={"members": members},
    ).to_pylist()
    told = {row["query_id"]: row["images"] for row in rows}
    found = []
    for row in by_ids(data, list(told)):
        images = told[row["image_id"]]
        found.append((thumb_of(site, row, run=run, outcome="", caption=f"chose {images:,}", mark="chosen"), images))
    return found


def _parts(site: Site, data: Data, cluster: int, members: pa.Table, run: int | None) -> dict[str, list[Share]]:
    """What the images of a cluster are: by outcome, by label, by the set that selects them."""
    found = {}
    for title, field, column in (
        ("Outcome", "outcome", "outcome"),
        ("Label", "label", "label"),
        ("Selected for", "selected_for", "unnest(selected_for)"),
    ):
        rows = data.query(
            f"SELECT * FROM (SELECT {column} AS name, count(*) AS n FROM members GROUP BY 1) WHERE name IS NOT NULL "
            f"ORDER BY n DESC, name LIMIT {LABELS}",
            tables={"members": members},
        ).to_pylist()
        address = render.address(site, "/images")
        found[title] = [
            Share(
                name=row["name"],
                images=row["n"],
                url=f"{address}?{Selection.of({'cluster': [str(cluster)], field: [row['name']]}).url(**_of(run))}",
            )
            for row in rows
        ]
    return {title: shares for title, shares in found.items() if shares}


def _chart(rows: Sequence[Mapping[str, int]], log: bool) -> Markup:
    """The sizes of clusters, the largest first."""
    return charts.rank_chart(
        [row["images"] for row in rows],
        [row["selected"] for row in rows],
        "clusters, the largest first",
        "images, logarithmic" if log else "images",
        ("kept by dedup", "selected"),
        log=log,
    )
