"""What the pages about clusters show is what plain tables say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from dashboard_client import browsing
from fastapi.testclient import TestClient
from inspected_world import inspected

from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.pages import clusters
from lodeset.infra.report.charts import rank_chart
from lodeset.infra.session import Opened
from lodeset.pipeline.algorithms.clusters import hierarchy
from lodeset.pipeline.dag.store import File
from lodeset.pipeline.stages.fit_clusters import read_levels


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Opened, Data, TestClient]]:
    open_, made = inspected(tmp_path_factory.mktemp("clusters"))
    with opened(open_.store, made) as data, browsing(open_, data) as client:
        yield open_, data, client


def test_the_list_has_every_cluster_with_its_size(world: tuple[Opened, Data, TestClient]) -> None:
    _, data, client = world
    rows = data.rows("SELECT * FROM inspected WHERE cluster IS NOT NULL")
    sizes = Counter(row["cluster"] for row in rows)
    page = client.get("/clusters").text
    listed = re.findall(r"Cluster (\d+)</a></h3>\s*<p class=\"small soft\">(\d+) images?, (\d+) selected", page)
    chosen = Counter(row["cluster"] for row in rows if row["outcome"] == "in_shard")
    assert [(int(n), int(images), int(selected)) for n, images, selected in listed] == [
        (n, count, chosen[n]) for n, count in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]
    smallest = client.get("/clusters?order=smallest&scale=log").text
    assert re.findall(r"Cluster (\d+)</a></h3>", smallest)[0] == str(min(sizes, key=lambda n: (sizes[n], n)))
    assert "images, logarithmic" in smallest
    assert client.get("/clusters?order=color").status_code == 422
    assert client.get("/clusters?scale=color").status_code == 422


def test_a_cluster_shows_its_ends_its_parts_and_its_queries(world: tuple[Opened, Data, TestClient]) -> None:
    _, data, client = world
    sizes = data.rows("SELECT cluster, count(*) AS n FROM by_cluster GROUP BY cluster ORDER BY n DESC")
    number = sizes[0]["cluster"]
    where = "WHERE cluster = ? ORDER BY centroid_similarity DESC, image_id"
    rows = data.rows(f"SELECT * FROM inspected {where}", [number])
    page = client.get(f"/clusters/{number}").text
    shown = re.findall(r'data-title="([0-9a-f]{32})"', page)
    ids = [row["image_id"] for row in rows]
    count = clusters.SHOWN
    assert len(ids) > count
    assert shown[:count] == ids[:count]
    rest = min(count, len(ids) - count)
    assert shown[count : count + rest] == ids[::-1][:rest]
    queries = Counter(row["query_id"] for row in rows if row["query_id"])
    assert set(queries) <= set(shown)
    for query, chosen in queries.items():
        assert re.search(rf'data-title="{query}".*?chose {chosen}<', page, re.DOTALL)
    labels = Counter(row["label"] for row in rows)
    for label, images in labels.items():
        assert re.search(
            rf'label={label}&amp;cluster={number}"><bdi>{label}</bdi></a></th><td class="n">{images}<', page
        )
    assert f"/images?cluster={number}" in page


def test_neighbors_are_the_most_alike_centroids(world: tuple[Opened, Data, TestClient]) -> None:
    open_, data, client = world
    fitted = data.artifact("fit_clusters/pool")
    assert fitted is not None
    (centroids,) = read_levels(open_.store, fitted)
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    cosines = unit @ unit[3]
    expected = [n for n in np.argsort(-cosines).tolist() if n != 3]
    page = client.get("/clusters/3").text
    found = re.findall(r"Cluster (\d+)</a></h3>\s*<p class=\"small soft\">cosine (-?[\d.]+)", page)
    assert [int(n) for n, _ in found] == expected[: clusters.NEIGHBORS]
    assert [float(c) for _, c in found] == pytest.approx(sorted(np.delete(cosines, 3), reverse=True), abs=1e-3)


def test_what_is_not_there_is_said(world: tuple[Opened, Data, TestClient]) -> None:
    client = world[2]
    assert client.get("/clusters/99").status_code == 404
    assert client.get("/clusters/-1").status_code == 422
    assert client.get("/clusters?start=24").status_code == 200


def test_the_path_of_a_cluster_leads_up_its_levels(tmp_path: Path) -> None:
    """Each level belongs to the nearest centroid of the one above it."""
    levels = [np.eye(6, dtype=np.float32), np.eye(6, dtype=np.float32)[[5, 1, 2]], np.eye(6, dtype=np.float32)[[1, 5]]]
    levels[0][0] = [0, 0.1, 0, 0, 0, 0.9]
    for number, level in enumerate(levels):
        np.save(tmp_path / f"{number}.npy", level)
    files = tuple(File(f"{number}.npy", len(level), 1, "") for number, level in enumerate(levels))

    class Fitted:
        def artifact(self, id_: str) -> SimpleNamespace:
            assert id_ == "fit_clusters/pool"
            return SimpleNamespace(tables={"centroids": files})

        def path_of(self, file: File) -> Path:
            return tmp_path / file.path

    found = {cluster: clusters._path(cast(Data, Fitted()), cluster) for cluster in (0, 1, 5)}
    assert found == {0: [1, 0], 1: [0, 1], 5: [1, 0]}
    paths = hierarchy.paths(np.arange(6, dtype=np.int32), hierarchy.parents(levels))
    assert [found[cluster] for cluster in found] == [paths[cluster][:-1].tolist() for cluster in found]


def test_columns_of_ranks_are_as_high_as_their_values() -> None:
    behind, front = [100.0, 10.0, 1.0], [50.0, 10.0, 0.0]
    for log in (False, True):
        svg = rank_chart(behind, front, "x", "y", ("all", "some"), log=log)
        paths = re.findall(r'<path class="column[^"]*" d="([^"]+)"', svg)
        heights = [
            [float(floor) - float(top) for floor, top in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)H", path)]
            for path in paths
        ]
        scaled = [[np.log10(1 + y) if log else y for y in values] for values in (behind, front)]
        unit = heights[0][0] / scaled[0][0]
        assert np.allclose(np.array(heights) / unit, scaled, atol=0.2 / unit)
    many = rank_chart(np.arange(5000, 0, -1.0).tolist(), [1.0] * 5000, "x", "y", ("all", "some"))
    assert many.count("V") < 4000  # columns stand for several
