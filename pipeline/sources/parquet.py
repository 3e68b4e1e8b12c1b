"""Images in a column of Parquet files: one member a row, named `<column>/<row>`, whose offset is the row group. In a column of lists,
images are named `<column>/<row>.<place>`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.cells import (
    Column,
    NotEncoded,
    class_names,
    column_of,
    image_bytes,
    images_of,
    is_binary,
    is_encoded,
    named,
    stored_type,
)
from lodeset.pipeline.sources.containers import Alive, Container
from lodeset.pipeline.sources.files import Bytes
from lodeset.pipeline.sources.members import Member, Sample
from lodeset.pipeline.sources.metadata import MAX_BYTES, Metadata, from_fields, is_known, partition_fields, plain

if TYPE_CHECKING:
    from lodeset.pipeline.sources.slices import Slice

# What a batch of rows may take, by the footer's word, and the rows it may have whatever the footer says.
_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 1_024
_READ_BYTES = 2**20


def parquet_members(raw: Bytes, image: str) -> Iterator[Member]:
    """One member a row, by the footer alone; its size is the row group's mean over all columns that are read."""
    file, column, columns = _opened(raw, image)
    groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
    rows = sum(meta.num_rows for meta in groups)
    if rows > 8 * raw.size_bytes:
        # One bit a row is the least that any encoding of different images takes; a crafted footer would fill memory.
        raise ValueError(f"the footer promises {rows} rows in {raw.size_bytes} bytes")
    for group, meta in enumerate(groups):
        mean = _bytes_of(meta, columns) // max(1, meta.num_rows)
        for row in range(meta.num_rows):
            yield Member(f"{column.name}/{row}", group, mean)


def read_rows(piece: Slice, max_bytes: int) -> Iterator[Sample]:
    """The images of these rows and what the other columns say of them, a bounded batch at a time.

    Raises:
        LodesetError: the file system does not give the file, or its footer is no longer the one that was listed.
    """
    uri, members = piece.uri, piece.members
    refused = [m for m in members if m.reason]
    for member in refused:
        yield Sample(uri, member.name, member.offset, member.size_bytes, reason=member.reason, detail=member.detail)
    if len(refused) == len(members):
        return
    with Bytes(uri) as raw:
        try:
            file, column, columns = _opened(raw, piece.image)
        except LodesetError:
            raise
        except Exception as error:
            raise LodesetError(f"{uri} changed since it was listed ({error}): run again") from error
        for group, rows in itertools.groupby((m for m in members if not m.reason), key=lambda m: m.offset):
            wanted = {int(m.name.rsplit("/", 1)[1]) for m in rows}
            batches = _batches(raw, file, columns, group)
            yield from _read_group(batches, uri, column, class_names(file.schema_arrow), group, wanted, max_bytes)


def _read_group(
    batches: Iterator[pa.RecordBatch],
    uri: str,
    column: Column,
    classes: Mapping[str, Sequence[str]],
    group: int,
    wanted: set[int],
    max_bytes: int,
) -> Iterator[Sample]:
    row = 0
    while wanted:
        wrong = "there are no more"
        try:
            batch = next(batches, None)
        except LodesetError:
            raise
        except Exception as error:
            # pyarrow raises OSError for corrupt pages, too; what the file system says is told apart by `Bytes`.
            batch, wrong = None, _told(error)
        if batch is None:
            detail = f"{len(wanted)} rows of row group {group} from {min(wanted)} on: {wrong}"[:200]
            yield Sample(uri, "", group, 0, reason="unreadable_archive", detail=detail)
            return
        for index in range(batch.num_rows):
            if row + index in wanted:
                wanted.discard(row + index)
                place = (f"{column.name}/{row + index}", group)
                metadata, wrongs = _said(batch, index, column, classes, uri)
                if wrongs:
                    yield Sample(uri, *place, 0, reason="bad_metadata", detail="; ".join(wrongs)[:200])
                yield from _images(batch.column(column.name)[index], uri, place, column, metadata, max_bytes)
        row += batch.num_rows


def _said(
    batch: pa.RecordBatch, index: int, column: Column, classes: Mapping[str, Sequence[str]], uri: str
) -> tuple[Metadata, list[str]]:
    """What the other columns say in this row, and what of it cannot be read."""
    fields: dict[str, Any] = {}
    wrong: list[str] = []
    length = 0
    for name in batch.schema.names:
        if name == column.name:
            continue
        try:
            value = _as_text(batch.column(name)[index].as_py())
            fields[name] = named(plain(value), classes.get(name))
        except Exception as error:
            # Text that is not UTF-8, dates beyond Python's: nothing checked them before.
            wrong.append(f"column `{name}`: {type(error).__name__}: {error}")
            continue
        more = len(fields[name]) if isinstance(fields[name], str) else 0
        if length + more > MAX_BYTES:
            del fields[name]
            wrong.append(f"column `{name}`: {length + more} characters up to here in this row, more than {MAX_BYTES}")
        else:
            length += more
    return from_fields(partition_fields(uri), fields), wrong


def _as_text(value: Any) -> Any:
    """Text that its writer kept as bytes, as older ones do; bytes that are none (a mask) say nothing."""
    if not isinstance(value, bytes):
        return value
    try:
        return None if is_encoded(value) else value.decode()
    except UnicodeDecodeError:
        return None


def _images(
    cell: Any, uri: str, place: tuple[str, int], column: Column, metadata: Metadata, max_bytes: int
) -> Iterator[Sample]:
    """The images of one cell; a cell without any is one reject."""
    name, group = place
    found = False
    try:
        for behind, one in images_of(cell, column.many):
            found = True
            yield _sample(one, uri, f"{name}{behind}", group, metadata, max_bytes)
    except NotEncoded as error:
        yield Sample(uri, name, group, 0, reason="not_encoded", detail=str(error))
        return
    if not found:
        yield Sample(uri, name, group, 0, reason="empty", detail="no image in this row")


def _sample(cell: Any, uri: str, name: str, group: int, metadata: Metadata, max_bytes: int) -> Sample:
    try:
        data = image_bytes(cell)
    except NotEncoded as error:
        return Sample(uri, name, group, 0, reason="not_encoded", detail=str(error))
    except Exception as error:
        return Sample(uri, name, group, 0, reason="corrupt", detail=_told(error)[:200])
    if len(data) > max_bytes:
        detail = f"{len(data)} > {max_bytes} (ingest.max_bytes)"
        return Sample(uri, name, group, len(data), reason="too_many_bytes", detail=detail)
    return Sample(uri, name, group, len(data), data=data, metadata=metadata)


class Cells:
    """The image cells of one Parquet file, walked forward a bounded batch at a time.

    Rows are best asked for in their order: going back reads the row group from its start.
    """

    def __init__(self, raw: Bytes, image: str) -> None:
        """Raises what pyarrow raises for a file that is none, ValueError for one without the column."""
        self.image = image
        self._raw = raw
        self._file, self._column, columns = _opened(raw, image)
        self._columns = columns[:1]
        self._group, self._first = -1, 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch = pa.record_batch({image: []})

    def read(self, group: int, place: str) -> bytes:
        """The bytes of one image, by its row or `row.place`. Raises what pyarrow raises for damaged pages, IndexError where there is
        no such row."""
        number, _, item = place.partition(".")
        row = int(number)
        if group != self._group or row < self._first:
            self._batches = _batches(self._raw, self._file, self._columns, group)
            self._group, self._first, self._batch = group, 0, self._batch.slice(0, 0)
        while row >= self._first + self._batch.num_rows:
            self._first += self._batch.num_rows
            batch = next(self._batches, None)
            if batch is None:
                raise IndexError(f"row group {group} has {self._first} rows, no row {row}")
            self._batch = batch
        cell = self._batch.column(0)[row - self._first]
        return image_bytes(cell.values[int(item)] if item else cell)


class Rows:
    """An opened Parquet file, whose images are read again by their places."""

    def __init__(self, uri: str, alive: Alive = lambda: None) -> None:
        self._raw = Bytes(uri)
        self._cells: Cells | None = None

    def read(self, member: str, offset: int, size_bytes: int, first: int) -> bytes:
        column, row = member.rsplit("/", 1)
        if self._cells is None or self._cells.image != column:
            self._cells = Cells(self._raw, column)
        return self._cells.read(offset, row)

    def close(self) -> None:
        self._raw.close()


def _opened(raw: Bytes, image: str) -> tuple[pq.ParquetFile, Column, list[str]]:
    """The file with its footer, the column of images, and the columns to read: that one, then those that say something about it."""
    file = pq.ParquetFile(raw)
    schema = file.schema_arrow
    # Of a Hugging Face image {bytes, path} the path is not read: a bad one must not cost the image.
    column = column_of(schema, image)
    # Scalars only: vectors and nested values are no metadata; bytes are where they are called so.
    others = [
        f.name for f in schema if f.name != column.name and (_is_scalar(f.type) or _is_text_in_bytes(f.type, f.name))
    ]
    return file, column, list(dict.fromkeys([column.path, *others]))


def _batches(raw: Bytes, file: pq.ParquetFile, columns: Sequence[str], group: int) -> Iterator[pa.RecordBatch]:
    meta = file.metadata.row_group(group)
    rows = _BATCH_BYTES * max(1, meta.num_rows) // max(1, _bytes_of(meta, columns))
    # Copied from its dictionary into a batch, one large value that a page refers to a thousand times would fill memory. Values
    # of other columns would be gathered into a dictionary of the whole row group, so they are read as they are.
    repeated = [c.path_in_schema for c in _chunks(meta, columns) if _is_mostly_dictionary(c)]
    # With the footer given, opening reads nothing: footers of thousands of row groups take long to parse.
    reader = pq.ParquetFile(
        raw, metadata=file.metadata, buffer_size=_READ_BYTES, pre_buffer=False, read_dictionary=repeated
    )
    yield from reader.iter_batches(
        batch_size=min(max(1, rows), _BATCH_ROWS), row_groups=[group], columns=columns, use_threads=False
    )


def _is_text_in_bytes(kind: pa.DataType, name: str) -> bool:
    return is_known(name) and is_binary(stored_type(kind))


def _is_scalar(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_scalar(kind.value_type)
    tests = (
        pa.types.is_nested,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return not any(test(kind) for test in tests)


def _is_mostly_dictionary(chunk: Any) -> bool:
    if chunk.physical_type != "BYTE_ARRAY" or not chunk.has_dictionary_page or chunk.dictionary_page_offset is None:
        return False
    return bool(2 * (chunk.data_page_offset - chunk.dictionary_page_offset) > chunk.total_compressed_size)


def _bytes_of(meta: Any, columns: Sequence[str]) -> int:
    """Uncompressed, by the footer."""
    return sum(max(0, chunk.total_uncompressed_size) for chunk in _chunks(meta, columns))


def _chunks(meta: Any, columns: Sequence[str]) -> list[Any]:
    chunks = [meta.column(c) for c in range(meta.num_columns)]
    return [
        c
        for c in chunks
        if any(c.path_in_schema == name or c.path_in_schema.startswith(f"{name}.") for name in columns)
    ]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


PARQUET = Container(
    kind="parquet",
    suffixes=(".parquet",),
    members=lambda raw, file: parquet_members(raw, file.image),
    opened=Rows,
    read=read_rows,
    version=0,
    sidecars=False,
    image_column=True,
    grouped=True,
)
