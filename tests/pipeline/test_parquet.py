"""Parquet files as strangers make them: one bad value costs its row, one bad page its row group, and memory is bounded."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import id_of, picture, write_parquet
from whole import pieces, read, rejects

from lodeset.pipeline.config import Ingest
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources import parquet
from lodeset.pipeline.sources.files import Bytes
from lodeset.pipeline.sources.reading import Location, read_images, read_slice
from lodeset.pipeline.stages.ingest import run as ingest

LOST = "unreadable_archive"


def test_damaged_pages_are_one_reject_a_row_group(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(4)], row_group_size=2)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # the first page's header
    path.write_bytes(data)
    assert [bool(s.data) for s in read(path)] == [False, True, True]
    (row,) = rejects(path)
    assert row["reason"] == LOST and row["detail"].startswith("2 rows of row group 0 from 0 on: OSError")


def test_a_row_that_says_nonsense_keeps_its_image_and_its_other_columns(tmp_path: Path) -> None:
    text = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfex"))
    table = pa.table({"image": [picture(1), picture(2)], "caption": text, "label": ["a", "b"], "v": [[1.0], [2.0]]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [(s.metadata.caption, s.metadata.label, s.metadata.extra) for s in found if s.data] == [
        (None, "a", None),
        ("x", "b", None),
    ]
    (row,) = rejects(tmp_path / "a.parquet")
    assert row["reason"] == "bad_metadata" and "column `caption`: UnicodeDecodeError" in row["detail"]


def test_texts_that_are_kept_as_bytes_are_read_and_other_bytes_are_no_metadata(tmp_path: Path) -> None:
    """Writers that do not mark texts as such store bytes: a take-down must find the address."""
    for n, kind in enumerate((pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary()))):
        texts = {"URL": [b"https://e.org/1", None], "text": ["süß".encode(), b"\xff"], "cls": [b"3.0", b"cat"]}
        columns = {name: pa.array(values, pa.binary()).cast(kind) for name, values in texts.items()}
        mask = pa.array([picture(3), picture(4)], pa.binary())
        table = pa.table({"image": [picture(1), picture(2)], **columns, "label": mask, "embedding": mask})
        pq.write_table(table, tmp_path / f"{n}.parquet")
        first, second = (s.metadata for s in read(tmp_path / f"{n}.parquet"))
        assert (first.url, first.caption, first.label, first.extra) == ("https://e.org/1", "süß", "3", None)
        assert (second.url, second.caption, second.label, second.extra) == (None, None, "cat", None)
        assert rejects(tmp_path / f"{n}.parquet") == []


def test_images_as_base64_in_a_column_of_bytes(tmp_path: Path) -> None:
    cells = [base64.b64encode(picture(1)), base64.urlsafe_b64encode(picture(2)), b"abcdef", b"\0\xff"]
    path = write_parquet(tmp_path / "a.parquet", cells)
    assert [id_of(s.data) for s in read(path)[:2]] == [id_of(picture(1)), id_of(picture(2))]
    assert [row["reason"] for row in rejects(path)] == ["not_an_image"] * 2


def test_large_payloads_and_repeated_ones_are_read_in_bounded_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that pages refer to by its place in a dictionary is not copied for every row, and unused columns stay unread."""
    value = picture(1)
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 5_000), pa.array([value]))
    pq.write_table(pa.table({"image": repeated, "vector": [b"x" * 1_000] * 5_000}), tmp_path / "a.parquet")
    whole = parquet._batches
    sizes: list[tuple[int, int]] = []

    def watched(*arguments: Any) -> Iterator[pa.RecordBatch]:
        for batch in whole(*arguments):
            sizes.append((batch.num_rows, batch.nbytes))
            yield batch

    monkeypatch.setattr(parquet, "_batches", watched)
    seen = read(tmp_path / "a.parquet")
    assert len(seen) == 5_000 and {s.data for s in seen} == {value}
    assert max(rows for rows, _ in sizes) <= 1_024
    assert max(size for _, size in sizes) < 10 * len(value) + 16 * 1_024
    (piece,) = pieces(tmp_path / "a.parquet")
    assert {s.reason for s in read_slice(piece, len(value) - 1)} == {"too_many_bytes"}


def test_a_footer_that_promises_too_much_is_a_reject(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array([b""] * 40_000)}), path)
    assert 8 * path.stat().st_size < 40_000
    (row,) = rejects(path)
    assert row["reason"] == LOST and "promises 40000 rows" in row["detail"]


def not_utf8(*values: bytes) -> pa.StringArray:
    """Text as nobody checked it."""
    ends = [0]
    for value in values:
        ends.append(ends[-1] + len(value))
    return pa.StringArray.from_buffers(
        len(values), pa.py_buffer(b"".join(end.to_bytes(4, "little") for end in ends)), pa.py_buffer(b"".join(values))
    )


def test_the_texts_of_a_row_are_limited_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_BYTES", 1_000)
    path = write_parquet(tmp_path / "a.parquet", [picture(1)], **{name: [name * 400] for name in "abcd"})
    (found,) = (s for s in read(path) if s.data)
    assert found.metadata.extra is not None and sorted(json.loads(found.metadata.extra)) == ["a", "b"]
    (row,) = rejects(path)
    assert row["reason"] == "bad_metadata" and row["detail"].count("1200 characters up to here") == 2


def test_a_text_that_every_row_repeats_does_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary makes the file small; the images are read all the same."""
    monkeypatch.setattr(ingest, "_METADATA_LENGTH", 1_000_000)
    data = [picture(n) for n in range(40)]
    path = write_parquet(tmp_path / "a.parquet", data, row_group_size=100, caption=["x" * 50_000] * 40)
    (piece,) = pieces(path)
    tables, counts = ingest.ingest_slice("pool", piece, Ingest())
    assert tables["images"].num_rows == tables["locations"].num_rows == counts["images"] == 40
    assert tables["metadata"].num_rows == 20
    assert [r["reason"] for r in rejects(path)] == ["bad_metadata"] * 20


def test_a_path_that_is_not_utf8_does_not_cost_its_image(tmp_path: Path) -> None:
    cells = pa.StructArray.from_arrays([pa.array([picture(1), picture(2)]), not_utf8(b"\xff", b"x")], ["bytes", "path"])
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    assert [s.data for s in read(tmp_path / "a.parquet")] == [picture(1), picture(2)]
    assert rejects(tmp_path / "a.parquet") == []


def test_a_cell_that_cannot_be_converted_costs_its_row(tmp_path: Path) -> None:
    twice = [pa.field("bytes", pa.binary())] * 2
    tables = {
        "text": pa.table({"image": not_utf8(b"\xff", b"x"), "n": [1, 2]}),
        "struct": pa.table({"image": pa.StructArray.from_arrays([pa.array([b"a", b"b"])] * 2, fields=twice)}),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert [r["reason"] for r in rejects(tmp_path / "text.parquet")] == ["corrupt", "not_encoded"]
    assert [r["reason"] for r in rejects(tmp_path / "struct.parquet")] == ["corrupt", "corrupt"]


def test_two_columns_of_the_image_s_name_are_one_reject(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([picture(1)])] * 2, names=["image", "image"])
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = rejects(tmp_path / "a.parquet")
    assert row["reason"] == "wrong_image_column" and "2 columns `image`" in row["detail"]


@pytest.mark.parametrize("image", ["image", "image.raw", "image.bytes"])
def test_sizes_are_those_of_all_columns_that_are_read(tmp_path: Path, image: str) -> None:
    """A dot in a column's name is no path into it."""
    data, captions = [picture(n) for n in range(8)], [f"{n}" * 10_000 for n in range(8)]
    table = pa.table({image: data, "image.caption": captions, "vector": [[0.5] * 9_000] * 8})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    with Bytes(str(tmp_path / "a.parquet")) as raw:
        sizes = {m.size_bytes for m in parquet.parquet_members(raw, image)}
    assert len(sizes) == 1
    assert 10_000 < sizes.pop() < 12_000 + max(map(len, data))


def test_thousands_of_row_groups_cost_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is read: the footer, a multiple of the data here, is parsed once."""
    path = write_parquet(tmp_path / "a.parquet", [b"%d" % n for n in range(300)], row_group_size=1, n=list(range(300)))
    (piece,) = pieces(path)
    taken, read = 0, Bytes.read

    def counting(self: Bytes, size: int = -1) -> bytes:
        nonlocal taken
        data = read(self, size)
        taken += len(data)
        return data

    monkeypatch.setattr(Bytes, "read", counting)
    assert [s.data for s in read_slice(piece, 100)] == [b"%d" % n for n in range(300)]
    assert taken < 3 * path.stat().st_size
    places = [Location(id_of(b"%d" % n), str(path), f"image/{0}", n, 1) for n in range(300)]
    taken = 0
    assert [place.offset for place, _ in read_images(places)] == list(range(300))
    assert taken < 3 * path.stat().st_size


def test_images_are_read_again_in_bounded_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row group of 5,000 rows of one large value; in any order, and without the other columns."""
    value = picture(1)
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 5_000), pa.array([value]))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": repeated, "caption": ["x" * 1_000] * 5_000}), path)
    whole = parquet._batches
    batches: list[pa.RecordBatch] = []

    def watched(*arguments: Any) -> Iterator[pa.RecordBatch]:
        for batch in whole(*arguments):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(parquet, "_batches", watched)
    rows = [0, 1, 1, 1_500, 4_999, 3]
    places = [Location(id_of(value), str(path), f"image/{row}", 0, len(value)) for row in rows]
    assert [data for _, data in read_images(places)] == [value] * len(rows)
    assert max(batch.num_rows for batch in batches) <= 1_024
    assert max(batch.nbytes for batch in batches) < 10 * len(value) + 16 * 1_024
    assert len(batches) == 5 + 1, "forward once, and again from the start for row 3"
    with pytest.raises(LodesetError, match="row group 0 has 5000 rows, no row 5000"):
        list(read_images([Location(id_of(value), str(path), "image/5000", 0, len(value))]))
