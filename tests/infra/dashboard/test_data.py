"""What pages read of a run is what its tables say, and nothing else can be read."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest
from inspected_world import HOSTILE, inspected
from PIL import Image

from lodeset.infra.dashboard import data as data_module
from lodeset.infra.dashboard.data import Data, SlowError, opened
from lodeset.infra.dashboard.making import found
from lodeset.infra.dashboard.selection import ORDERS, Selection, bitmask, inside, page, polygon, rows
from lodeset.infra.session import Opened
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.stages.dedup.what_if import counts, difference
from lodeset.pipeline.tables.vectors import read_vectors


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Opened, Data]]:
    open_, made = inspected(tmp_path_factory.mktemp("inspected"))
    with opened(open_.store, made) as data:
        yield open_, data


def table(open_: Opened, data: Data, id_: str, name: str) -> list[dict]:
    artifact = data.artifact(id_)
    assert artifact is not None
    return open_.store.table(artifact.tables[name]).to_pylist()


def test_every_image_has_a_row_with_what_became_of_it(world: tuple[Opened, Data]) -> None:
    open_, data = world
    found_rows = data.rows("SELECT * FROM inspected")
    assert [r["row"] for r in found_rows] == list(range(len(found_rows)))
    assert [(r["image_id"], r["set"]) for r in found_rows] == sorted((r["image_id"], r["set"]) for r in found_rows)
    pool = {r["image_id"]: r for r in found_rows if r["set"] == "pool"}
    assert len(pool) == 300 and HOSTILE in {r["member"] for r in pool.values()}
    filtered = {r["image_id"]: r["reason"] for r in table(open_, data, "filter/pool", "filtered")}
    judged = {r["image_id"]: r for r in table(open_, data, "dedup/pool", "duplicates")}
    listed = {r["image_id"]: r for r in table(open_, data, "write_shards/all", "index")}
    assert filtered and any(not r["kept"] for r in judged.values()) and listed
    for image_id, row in pool.items():
        if image_id in filtered:
            expected = (filtered[image_id], "filter")
        elif not judged[image_id]["kept"]:
            expected = (judged[image_id]["reason"], "dedup")
        else:
            expected = ("in_shard", "") if image_id in listed else ("not_selected", "retrieve")
        assert (row["outcome"], row["dropped_by"]) == expected
        assert row["shard"] == listed.get(image_id, {}).get("shard")
    sizes = Counter(r["group_id"] for r in judged.values())
    assert {r["group_id"]: r["group_size"] for r in pool.values() if r["group_id"]} == {
        g: n for g, n in sizes.items() if n > 1
    }
    assert Counter(r["outcome"] for r in found_rows if r["set"] != "pool") == {"reference_set": 4, "curated_set": 6}
    values, codes = data.codes("outcome")
    assert [values[code] for code in codes] == [r["outcome"] for r in found_rows]


def test_the_map_is_the_first_two_principal_components(world: tuple[Opened, Data]) -> None:
    open_, data = world
    embedded = data.artifact("embed/pool")
    assert embedded is not None
    ids, vectors = read_vectors(open_.store, embedded.tables["vectors"])
    wide = vectors.astype(np.float64) - vectors.astype(np.float64).mean(axis=0)
    _, _, axes = np.linalg.svd(wide, full_matrices=False)
    expected = dict(zip(ids, wide @ axes[:2].T, strict=True))
    found_rows = data.rows("SELECT image_id, x, y FROM inspected WHERE set = 'pool'")
    drawn = np.array([[r["x"], r["y"]] for r in found_rows])
    plain = np.array([expected[r["image_id"]] for r in found_rows])
    ratio = drawn / plain  # one scale for both axes, and a sign for each
    assert np.allclose(np.abs(ratio), np.median(np.abs(ratio)), rtol=0.05) and (np.abs(drawn) <= 1.2).all()


def test_clusters_are_ordered_by_the_cosine_with_their_centroid(world: tuple[Opened, Data]) -> None:
    open_, data = world
    fitted, embedded = data.artifact("fit_clusters/pool"), data.artifact("embed/pool")
    assert fitted is not None and embedded is not None
    centroids = np.load(io.BytesIO(open_.store.bytes_of(fitted.tables["centroids"][0])))
    ids, vectors = read_vectors(open_.store, embedded.tables["vectors"])
    vector = dict(zip(ids, vectors.astype(np.float32), strict=True))
    ordered = data.rows("SELECT * FROM by_cluster")
    assert ordered == sorted(ordered, key=lambda r: (r["cluster"], -r["centroid_similarity"], r["image_id"]))
    for row in ordered:
        centroid = centroids[row["cluster"]]
        cosine = vector[row["image_id"]] @ centroid / np.linalg.norm(centroid)
        assert row["centroid_similarity"] == pytest.approx(cosine, abs=1e-3)


def test_thumbnails_are_those_of_their_images(world: tuple[Opened, Data]) -> None:
    _, data = world
    for row in data.rows("SELECT * FROM inspected WHERE image_id < '3'"):
        picture = data.thumbnail(row["picture_file"], row["picture_row"])
        assert picture is not None
        small = Image.open(io.BytesIO(picture))
        assert small.format == "WEBP" and small.size == (96, 72)  # never enlarged
        with open(row["uri"], "rb") as tar:
            tar.seek(row["offset"])
            whole = Image.open(io.BytesIO(tar.read(row["size_bytes"]))).convert("RGB")
        difference_ = np.abs(np.asarray(small.convert("RGB"), int) - np.asarray(whole, int))
        assert difference_.mean() < 12
    assert data.thumbnail(99, 0) is None and data.thumbnail(0, 10**6) is None


def test_the_present_value_of_a_setting_drops_what_the_run_dropped(world: tuple[Opened, Data]) -> None:
    _, data = world
    dedup = data.dedup
    assert dedup is not None
    setting, joins = dedup.setting("min_score"), data.joins("min_score")
    artifact = data.artifact("dedup/pool")
    assert artifact is not None
    told = counts(joins, setting, setting.now, dedup.spec, dedup.pool)
    assert told.dropped == sum(artifact.rows.dropped.values()) and told.groups == artifact.details["groups"]
    assert told.leaked == artifact.rows.dropped.get("reference", 0)
    assert difference(dedup.images, joins, setting, setting.now, dedup.spec.keeper).num_rows == 0
    with pytest.raises(LodesetError, match="threshold decides nothing in this run; what does: min_score"):
        dedup.setting("threshold")
    edge = next(r for r in data.pairs.to_pylist() if r["linked"])
    ids = dedup.images.ids
    pair = data.edge(ids[edge["b"]], ids[edge["a"]])
    assert pair is not None and pair["linked"] and pair["image_id_a"] == ids[edge["a"]]
    assert data.edge(ids[0], "f" * 32) is None


def test_the_database_reads_nothing_else(world: tuple[Opened, Data], monkeypatch: pytest.MonkeyPatch) -> None:
    open_, data = world
    other = Path(open_.store.path("")) / "runs" / "1.json"
    for sql in (
        "SELECT * FROM read_text('/etc/passwd')",
        f"SELECT * FROM read_text('{other}')",
        "COPY inspected TO '/tmp/stolen.csv'",
        "SET enable_external_access = true",
        "SET memory_limit = '100GB'",
        "INSTALL httpfs",
        "ATTACH '/tmp/x.db'",
    ):
        with pytest.raises(duckdb.Error):
            data.query(sql)
    monkeypatch.setattr(data_module, "STATEMENT_S", 0.2)
    with pytest.raises(SlowError, match="ask for less at once"):
        data.query("SELECT count(*) FROM range(1000000000) a, range(1000000) b")
    assert data.rows("SELECT 1 AS one") == [{"one": 1}]  # and goes on


def test_what_memory_cannot_hold_lies_neither_in_the_store_nor_where_the_dashboard_was_started(
    world: tuple[Opened, Data],
) -> None:
    open_, data = world
    (row,) = data.rows("SELECT current_setting('temp_directory') AS folder")
    folder = Path(row["folder"])
    assert folder.is_absolute() and folder.is_dir()
    for elsewhere in (Path.cwd(), Path(open_.store.path(""))):
        assert elsewhere not in (folder, *folder.parents)


def test_a_selection_is_what_its_url_says(world: tuple[Opened, Data]) -> None:
    _, data = world
    asked = {"outcome": ["near", "in_shard"], "set": ["pool"], "cluster": ["2", "10"], "text": ["JPG"], "other": ["x"]}
    selection = Selection.of(asked)
    assert Selection.of({k: [v for n, v in selection.parameters() if n == k] for k in asked}) == selection
    every = data.rows("SELECT * FROM inspected")
    expected = [r["row"] for r in every if r["outcome"] == "in_shard" and r["cluster"] in (2, 10)]
    assert rows(data, selection).tolist() == expected  # copies are in no cluster
    assert selection.without("cluster", "10").cluster == (2,) and selection.without("text").text == ""
    assert rows(data, Selection()).tolist() == list(range(len(every)))
    for wrong in ({"cluster": ["x"]}, {"group_id": ["'; DROP"]}, {"lasso": ["0,0;1,1"]}, {"lasso": ["0,0;1,1;x"]}):
        with pytest.raises(LodesetError):
            Selection.of(wrong)
    hostile = Selection.of({"text": [HOSTILE], "label": ["' OR true --"]})
    assert rows(data, hostile).tolist() == []


def test_a_lasso_takes_what_lies_inside(world: tuple[Opened, Data]) -> None:
    _, data = world
    lasso = "-0.5,-0.5;0.5,-0.4;0.4,0.5;0.0,0.1;-0.5,0.6"
    taken = inside(polygon(lasso), data.column("x"), data.column("y"))
    assert 0 < taken.sum() < len(taken)
    corners = polygon(lasso).astype(float)
    for x, y, here in zip(data.column("x"), data.column("y"), taken, strict=True):
        ends = np.roll(corners, -1, axis=0)
        angles = np.arctan2(ends[:, 1] - y, ends[:, 0] - x) - np.arctan2(corners[:, 1] - y, corners[:, 0] - x)
        turns = ((angles + np.pi) % (2 * np.pi) - np.pi).sum() / (2 * np.pi)
        assert here == (abs(turns) > 0.5)
    shown = page(data, Selection(lasso=lasso, outcome=("in_shard",)), size=500)
    inside_rows = set(np.flatnonzero(taken).tolist())
    assert shown.total == len(shown.images) and {r["row"] for r in shown.images} <= inside_rows
    mask = np.unpackbits(
        np.frombuffer(bitmask(rows(data, Selection(lasso=lasso)), len(taken)), np.uint8), bitorder="little"
    )
    assert mask[: len(taken)].astype(bool).tolist() == taken.tolist()


def test_pages_of_a_gallery_follow_one_another(world: tuple[Opened, Data]) -> None:
    _, data = world
    for order in ORDERS:
        whole = [r["row"] for r in page(data, Selection(set=("pool",)), order, size=500).images]
        parts, start = [], 0
        while start is not None:
            some = page(data, Selection(set=("pool",)), order, start, 70)
            parts += [r["row"] for r in some.images]
            start = some.next
        assert parts == whole and sorted(whole) == rows(data, Selection(set=("pool",))).tolist()
    with pytest.raises(LodesetError, match="choose one of image_id"):
        page(data, Selection(), "x; DROP TABLE")


def test_what_was_made_is_found_again(world: tuple[Opened, Data]) -> None:
    open_, data = world
    again = found(open_)
    assert again is not None and again.artifact.fingerprint == data.inspected.artifact.fingerprint
