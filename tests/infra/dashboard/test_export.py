"""What is downloaded is the selection, in formats that other programs read."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterator
from html import unescape

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dashboard_client import shown
from fastapi.testclient import TestClient
from PIL import Image

from lodeset.infra.dashboard import exporting
from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.groups import groups
from lodeset.pipeline.by_hand import read_list


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Data]]:
    with shown(tmp_path_factory.mktemp("inspected")) as made:
        yield made


@pytest.fixture
def expected(world: tuple[TestClient, Data]) -> list[dict]:
    return world[1].rows("SELECT * FROM inspected WHERE outcome IN ('near', 'blurry') ORDER BY row")


PATH = "/export?outcome=near&outcome=blurry&format="


def test_ids_are_a_list_by_hand(world: tuple[TestClient, Data], expected: list[dict], tmp_path: object) -> None:
    answer = world[0].get(PATH + "ids")
    assert answer.headers["content-disposition"] == 'attachment; filename="run-1-images.txt"'
    first, second, *rest = answer.text.splitlines()
    assert first == f"# {len(expected)} images of run 1" and "outcome=blurry&outcome=near" in second
    assert rest == [row["image_id"] for row in expected]
    assert world[0].get(second.removeprefix("# ")).status_code == 200  # the link reproduces the view
    file = f"{tmp_path}/a.txt"
    with open(file, "w") as sink:
        sink.write(answer.text)
    assert read_list(file, "by_hand.drop").ids == tuple(rest)
    every = world[0].get("/export?format=ids").text.splitlines()[2:]
    assert every == sorted({row["image_id"] for row in world[1].rows("SELECT image_id FROM inspected")})
    named = world[0].get("/export?format=ids&name=../../x%22%0d%0a").headers["content-disposition"]
    assert named == 'attachment; filename="x.txt"'


@pytest.mark.parametrize("number", ["2147483648", "-2147483649", "9" * 40, "1.5"])
def test_a_number_that_no_cluster_has_is_a_page(world: tuple[TestClient, Data], number: str) -> None:
    for path in ("/images", "/map", "/export"):
        answer = world[0].get(path, params={"cluster": number})
        assert answer.status_code == 400 and f"luster={number} is not the number of a cluster" in answer.text


def test_parquet_has_the_map_and_flat_columns(world: tuple[TestClient, Data], expected: list[dict]) -> None:
    table = pq.read_table(io.BytesIO(world[0].get(PATH + "parquet").content))
    assert not any(pa.types.is_nested(field.type) for field in table.schema)
    for column in ("image_id", "x", "y", "outcome", "cluster", "label", "uri"):
        assert table[column].to_pylist() == [row[column] for row in expected]
    whole = pq.read_table(io.BytesIO(world[0].get("/export?format=parquet").content))
    assert whole["selected_for"].to_pylist() == [
        None if row["selected_for"] is None else ";".join(row["selected_for"])
        for row in world[1].rows("SELECT * FROM inspected ORDER BY row")
    ]
    none = pq.read_table(io.BytesIO(world[0].get("/export?format=parquet&text=nothing-at-all").content))
    assert none.num_rows == 0 and none.schema.names == whole.schema.names


def test_groups_and_clusters_are_exported_whole(world: tuple[TestClient, Data]) -> None:
    client, data = world

    def listed(page: str) -> set[str]:
        link = re.search(r'href="([^"]*/export[^"]*format=ids[^"]*)"', client.get(page).text)
        assert link is not None
        return {line for line in client.get(unescape(link[1])).text.splitlines() if line[0] != "#"}

    found = groups(data)
    assert found is not None and len(found.number)
    for number in found.number.tolist():
        ids = found.of(number)
        assert listed(f"/duplicates/group?of={ids[-1]}") == set(ids)
    cluster = data.rows("SELECT min(cluster) AS one FROM inspected")[0]["one"]
    members = data.rows("SELECT image_id FROM inspected WHERE cluster = ?", [cluster])
    assert listed(f"/clusters/{cluster}") == {row["image_id"] for row in members}
    assert client.get("/duplicates/group/export?of=" + "0" * 32).status_code == 404


def test_csv_starts_no_formula(world: tuple[TestClient, Data], expected: list[dict]) -> None:
    found = list(csv.DictReader(io.StringIO(world[0].get(PATH + "csv").text)))
    assert [row["image_id"] for row in found] == [row["image_id"] for row in expected]
    assert [float(row["x"]) for row in found] == pytest.approx([row["x"] for row in expected])
    texts = ["=cmd()", "+1", "-1", "@x", "\tx", "plain=1", None]
    plain = exporting._plain(pa.chunked_array([texts])).to_pylist()
    assert plain == ["'=cmd()", "'+1", "'-1", "'@x", "'\tx", "plain=1", None]


def test_fiftyone_finds_pictures_and_labels(
    world: tuple[TestClient, Data], expected: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(io.BytesIO(world[0].get(PATH + "fiftyone").content)) as packed:
        labels = list(csv.DictReader(io.TextIOWrapper(packed.open("labels.csv"), "utf-8")))
        assert [row["filepath"] for row in labels] == [f"{row['image_id']}.webp" for row in expected]
        assert {f"data/{row['filepath']}" for row in labels} == set(packed.namelist()) - {"labels.csv"}
        assert Image.open(packed.open(f"data/{labels[0]['filepath']}")).format == "WEBP"
    tables = exporting._tables

    def renamed(data: Data, found: object) -> Iterator[pa.Table]:
        for table in tables(data, found):  # type: ignore[arg-type]
            at = table.schema.get_field_index("label")
            yield table.set_column(at, "label", pa.array(["=1+1"] * len(table), pa.string()))

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "_tables", renamed)
        with zipfile.ZipFile(io.BytesIO(world[0].get(PATH + "fiftyone").content)) as packed:
            labels = list(csv.DictReader(io.TextIOWrapper(packed.open("labels.csv"), "utf-8")))
    assert {row["label"] for row in labels} == {"'=1+1"}
    monkeypatch.setattr(exporting, "PICTURES", 3)
    answer = world[0].get(PATH + "fiftyone")
    assert answer.status_code == 400 and "choose fewer" in answer.text
