"""No source vanishes without a word: which stop the run, what is counted, and what is said of it."""

from __future__ import annotations

import base64
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import encoded, id_of, picture, pixels, write_folder, write_parquet, write_tar
from whole import read, rejects

from lodeset.pipeline.config import Ingest, Source
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.graph import ingest_stage
from lodeset.pipeline.sources.listing import expand
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.stages.ingest import run as ingest

pytestmark = pytest.mark.filterwarnings("ignore")  # what importing Beam warns of is not ours


def ran(store: Path, *sources: Any, **knobs: Any) -> Outcome:
    """The stage in this process."""
    made = [Source.model_validate(one if isinstance(one, dict) else {"uri": str(one)}) for one in sources]
    stage = ingest_stage(Ingest(**knobs), {}, "pool", made)
    outcome = ingest.run(Context(Store(str(store)), stage, f"{made}{knobs}", {}, 1, lambda _: None))
    assert outcome.rows.balanced()
    return outcome


def loose(folder: Path, count: int = 3) -> Path:
    return write_folder(folder, [(f"{n}.png", picture(n)) for n in range(count)])


def test_a_parquet_file_whose_images_lie_in_another_column_stops_the_run(tmp_path: Path) -> None:
    pool = loose(tmp_path / "pool")
    pq.write_table(pa.table({"img": [picture(9)], "n": [1]}), pool / "a.parquet")
    with pytest.raises(
        LodesetError, match=r"a\.parquet: no column `image` \(`image: img` may be meant\).* n \(int64\)"
    ):
        ran(tmp_path / "s", pool)
    with pytest.raises(LodesetError, match="image: img"):
        ran(tmp_path / "s", pool, limit=1)
    for outcome in (
        ran(tmp_path / "s", pool, on_unreadable="count"),
        ran(tmp_path / "s", {"uri": str(pool), "on_unreadable": "count"}),
    ):
        assert (outcome.rows.kept, outcome.rows.dropped) == (3, {"wrong_image_column": 1})
        assert "a.parquet" in outcome.details["warnings"][0]
    assert ran(tmp_path / "s", {"uri": str(pool), "image": "img"}).rows.kept == 4
    assert ran(tmp_path / "s", {"uri": str(pool), "exclude": "*.parquet"}).rows.kept == 3


def test_tables_and_packed_files_beside_images_are_counted(tmp_path: Path) -> None:
    """What img2dataset leaves beside its tars, and small archives of anything, stop nothing."""
    pool = loose(tmp_path / "pool")
    pq.write_table(pa.table({"key": ["1"], "caption": ["a cat"]}), pool / "a.parquet")
    (pool / "old.tar.gz").write_bytes(gzip.compress(b"x" * 100))
    (pool / "readme.zip").write_bytes(b"PK\x03\x04" + b"x" * 60)
    (pool / "bad.tar").write_bytes(b"<html>not found</html>")
    outcome = ran(tmp_path / "s", pool)
    assert outcome.rows.kept == 3
    assert outcome.rows.dropped == {"no_image_column": 1, "unreadable_archive": 3}
    assert len(outcome.details["warnings"]) == 2
    assert outcome.details["warnings"][0].startswith("3 archives cannot be read, or only parts of them, e.g. ")
    assert outcome.details["warnings"][1].startswith("1 Parquet file or list has no column of images: ")
    assert "there are: key (string), caption (string)" in outcome.details["warnings"][1]


def test_a_source_without_an_image_stops_the_run(tmp_path: Path) -> None:
    good, text = loose(tmp_path / "good"), write_folder(tmp_path / "text", [("a.txt", b"x"), ("b.dat", b"no image")])
    with pytest.raises(LodesetError, match=r"text has no readable image in its 2 files \(.*not_an_image 1"):
        ran(tmp_path / "s", good, text)
    outcome = ran(tmp_path / "s", good, {"uri": str(text), "on_unreadable": "count"})
    assert outcome.rows.kept == 3 and outcome.details["warnings"] == [f"{text} has no readable image"]
    assert ran(tmp_path / "s", good, text, limit=1).rows.kept == 1, "of a sample nobody knows"


def test_two_sources_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [("1.png", picture(1)), ("2.png", picture(2)), ("x.heif", b"no image at all")])
    assert (
        ran(tmp_path / "s", folder / "*.png", {"uri": str(folder / "x.heif"), "on_unreadable": "count"}).rows.kept == 2
    )
    with pytest.raises(LodesetError, match=r"x\.heif has no readable image"):
        ran(tmp_path / "s", folder / "*.png", folder / "x.heif")


def test_archives_that_are_most_of_a_source_stop_the_run(tmp_path: Path) -> None:
    pool = loose(tmp_path / "pool")
    (pool / "large.tar").write_bytes(b"damage" * 10_000)
    with pytest.raises(LodesetError, match=r"60,000 of the .* bytes .*large\.tar"):
        ran(tmp_path / "s", pool)
    assert ran(tmp_path / "s", pool, on_unreadable="count").rows.dropped == {"unreadable_archive": 1}
    (pool / "large.tar").unlink()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for n in range(9):
            archive.writestr(f"{n}.png", picture(20 + n))
    (pool / "train").write_bytes(buffer.getvalue())
    with pytest.raises(LodesetError, match=r"train: a zip archive .* without \.zip .*: unpack or rename it"):
        ran(tmp_path / "other", pool)
    (pool / "train").rename(pool / "train.zip")
    assert ran(tmp_path / "third", pool).rows.kept == len(list(pool.iterdir())) - 1 + 9


@pytest.mark.parametrize("name", ["train.rar", "a.tar.bz2", "b.gz", "c.7z"])
def test_a_source_that_is_packed_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(LodesetError, match="unpack it"):
        expand([Source(uri=str(tmp_path / name))], "pool")


def test_what_holds_other_files_is_named(tmp_path: Path) -> None:
    tar = io.BytesIO(write_tar(tmp_path / "t" / "a.tar", [("1.png", picture(1))]).read_bytes())
    hidden = {
        "zip": b"PK\x03\x04",
        "gzip": gzip.compress(b"x"),
        "tar": tar.getvalue(),
        "NumPy": b"\x93NUMPY\x01",
        "HDF5": b"\x89HDF\r\n\x1a\n",
    }
    write_tar(tmp_path / "all.tar", hidden.items())
    found = {r["member"]: r["detail"] for r in rejects(tmp_path / "all.tar") if r["reason"] == "archive"}
    assert found.keys() == hidden.keys() and all(name in detail for name, detail in found.items())


# -- what cells hold


def cells(path: Path, column: Any, **columns: Any) -> Path:
    pq.write_table(pa.table({"image": column, **columns}), path)
    return path


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    "column",
    [
        lambda d: pa.array([base64.b64encode(x).decode() for x in d]),
        lambda d: pa.array([base64.urlsafe_b64encode(x).decode().rstrip("=") for x in d], pa.large_string()),
        lambda d: pa.array(["data:image/png;base64," + base64.encodebytes(x).decode() for x in d]),
        lambda d: pa.array([x.hex() for x in d]).dictionary_encode(),
        lambda d: pa.array([base64.b64encode(x) for x in d], pa.binary()).cast(pa.string()),
        lambda d: pa.array([[b - 256 if b > 127 else b for b in x] for x in d], pa.list_(pa.int8())),
        lambda d: pa.array([list(x) for x in d], pa.list_(pa.int64())),
        lambda d: pa.array([{"bytes": x, "path": None} for x in d], STRUCT),
        lambda d: pa.array([{"data": x, "w": 1} for x in d], pa.struct([("data", pa.binary()), ("w", pa.int32())])),
        lambda d: pa.array([{"bytes": base64.b64encode(x).decode()} for x in d]),
        lambda d: pa.array([[{"bytes": x, "path": "p"}] for x in d], pa.list_(STRUCT)),
        lambda d: pa.array([[x] for x in d], pa.large_list(pa.large_binary())),
    ],
)
def test_encoded_images_are_read_however_cells_keep_them(tmp_path: Path, column: Any) -> None:
    data = [picture(n) for n in range(3)]
    path = cells(tmp_path / "a.parquet", column(data), label=["a", "b", "c"])
    found = read(path)
    assert [(s.data, s.metadata.label) for s in found] == list(zip(data, "abc", strict=True))
    places = [Location(id_of(s.data), s.uri, s.member, s.offset, s.size_bytes) for s in found]
    assert [d for _, d in read_images(places)] == data


def test_all_images_of_a_list_are_read(tmp_path: Path) -> None:
    data = [picture(n) for n in range(4)]
    path = cells(
        tmp_path / "a.parquet", pa.array([data[:3], [], None, data[3:]], pa.list_(pa.binary())), n=[1, 2, 3, 4]
    )
    found = read(path)
    assert [(s.member, s.data) for s in found if s.data] == [
        (f"image/{m}", d) for m, d in zip(("0.0", "0.1", "0.2", "3.0"), data, strict=True)
    ]
    assert [(r["member"], r["reason"]) for r in rejects(path)] == [("image/1", "empty"), ("image/2", "empty")]
    places = [Location(id_of(s.data), s.uri, s.member, s.offset, s.size_bytes) for s in found if s.data]
    assert [d for _, d in read_images(places[::-1])] == data[::-1]


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array(["/data/1.jpg", "https://e.org/2.jpg"]), "text ('/data/1.jpg')"),
        (pa.array(["abcd" * 20, "x"]), "text"),
        (pa.array([{"bytes": None, "path": "/x/1.jpg"}] * 2, STRUCT), "a path beside them is not followed"),
        (pa.array([{"bytes": None, "path": "/x/1.jpg"}] * 2), "a path beside them is not followed"),
        (pa.array([[0] * 784, [255] * 784]), "784 numbers, such as pixels"),
    ],
)
def test_cells_that_hold_no_images_are_named_for_what_they_are(tmp_path: Path, column: pa.Array, told: str) -> None:
    found = rejects(cells(tmp_path / "a.parquet", column))
    assert [r["reason"] for r in found] == ["not_encoded"] * 2 and told in found[0]["detail"]


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array([np.zeros((2, 2), int).tolist()]), "holds list<element: list<element: int64>>"),
        (pa.array([[0.5, 0.25]]), "holds list<element: double>"),
        (pa.array([3]), "holds int64"),
        (pa.array([{"path": "x"}]), "without a field `bytes`"),
    ],
)
def test_columns_that_hold_no_images_stop_the_run(tmp_path: Path, column: pa.Array, told: str) -> None:
    pool = loose(tmp_path / "pool")
    cells(pool / "a.parquet", column)
    with pytest.raises(LodesetError) as stopped:
        ran(tmp_path / "s", pool)
    assert told in str(stopped.value)


def test_the_column_may_be_in_capitals(tmp_path: Path) -> None:
    pq.write_table(pa.table({"Image": [picture(1)], "TEXT": ["a cat"]}), tmp_path / "a.parquet")
    (one,) = read(tmp_path / "a.parquet")
    assert (one.member, one.metadata.caption) == ("Image/0", "a cat")
    (place,) = read_images([Location(id_of(one.data), one.uri, one.member, one.offset, one.size_bytes)])
    assert place[1] == picture(1)


def test_classes_have_the_names_that_hugging_face_keeps_beside_them(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "n": {"dtype": "int64", "_type": "Value"}}
    table = pa.table({"image": [picture(n) for n in range(5)], "label": [1, 0, -1, 7, None], "n": [1] * 5})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
        tmp_path / "a.parquet",
    )
    assert [s.metadata.label for s in read(tmp_path / "a.parquet")] == ["dog", "cat", None, "7", None]
    for n, broken in enumerate(("{", "[]", '{"info": 3}', '{"info": {"features": {"label": {"names": 5}}}}')):
        path = tmp_path / f"{n}.parquet"
        pq.write_table(table.replace_schema_metadata({"huggingface": broken}), path)
        assert [s.metadata.label for s in read(path)] == ["1", "0", "-1", "7", None]


def test_lists_of_one_repeated_value_do_not_fill_memory(tmp_path: Path) -> None:
    """A dictionary makes the file small: 2,000 cells of one image of 1 MB."""
    value = encoded(pixels(1)) + b"\0" * 2**20
    column = pa.array([[0]] * 2_000, pa.list_(pa.int32()))
    lists = pa.ListArray.from_arrays(column.offsets, pa.DictionaryArray.from_arrays(column.values, pa.array([value])))
    path = cells(tmp_path / "a.parquet", lists)
    assert path.stat().st_size < 3 * len(value)
    before = pa.total_allocated_bytes()
    peak = count = 0
    for sample in read_each(path):
        count += bool(sample.data)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert count == 2_000
    assert peak < 256 * 2**20


def read_each(path: Path) -> Any:
    from whole import pieces

    from lodeset.pipeline.sources.reading import read_slice

    for piece in pieces(path):
        yield from read_slice(piece, 10**8)


def test_parquet_of_a_partition_says_what_its_folder_says(tmp_path: Path) -> None:
    write_parquet(tmp_path / "split=test" / "a.parquet", [picture(1)], label=["x"])
    (one,) = read(tmp_path)
    assert one.metadata.extra == '{"split": "test"}'
