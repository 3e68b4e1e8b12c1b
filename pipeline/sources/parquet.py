"""Images in a column of Parquet files: one member a row, named `<column>/<row>`, whose offset is the row group."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import LodesetError
from pipeline.sources.files import Bytes
from pipeline.sources.members import Member, Sample
from pipeline.sources.metadata import MAX_BYTES, Metadata, from_fields, plain

# What a batch of rows may take, by the footer's word, and the rows it may have whatever the footer says.
_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 1_024
_READ_BYTES = 2**20


def parquet_members(raw: Bytes, image: str) -> Iterator[Member]:
    """One member a row, by the footer alone; its size is the row group's mean."""
    footer = pq.ParquetFile(raw)
    names = footer.schema_arrow.names
    if image not in names:
        raise ValueError(f"no column `{image}`; there are: {', '.join(names)}")
    rows = sum(footer.metadata.row_group(g).num_rows for g in range(footer.num_row_groups))
    if rows > 8 * raw.size_bytes:
        # One bit a row is the least that any encoding of different images takes; a crafted footer would fill memory.
        raise ValueError(f"the footer promises {rows} rows in {raw.size_bytes} bytes")
    for group in range(footer.num_row_groups):
        meta = footer.metadata.row_group(group)
        mean = _bytes_of(meta, [image]) // max(1, meta.num_rows)
        for row in range(meta.num_rows):
            yield Member(f"{image}/{row}", group, mean)


def read_rows(uri: str, image: str, members: Sequence[Member], max_bytes: int) -> Iterator[Sample]:
    """The images of these rows and what the other columns say of them, a bounded batch at a time."""
    refused = [m for m in members if m.reason]
    for member in refused:
        yield Sample(uri, member.name, member.offset, member.size_bytes, reason=member.reason, detail=member.detail)
    if len(refused) == len(members):
        return
    with Bytes(uri) as raw:
        for group, rows in itertools.groupby((m for m in members if not m.reason), key=lambda m: m.offset):
            yield from _read_group(raw, image, group, {int(m.name.rsplit("/", 1)[1]) for m in rows}, max_bytes)


def _read_group(raw: Bytes, image: str, group: int, wanted: set[int], max_bytes: int) -> Iterator[Sample]:
    batches = _batches(raw, image, group)
    row = 0
    while wanted:
        wrong = "there are no more"
        try:
            batch = next(batches, None)
        except LodesetError:
            raise
        except Exception as error:
            # pyarrow raises OSError for corrupt pages, too; what the file system says is told apart by `Bytes`.
            batch, wrong = None, f"{type(error).__name__}: {' '.join(str(error).split())}"
        if batch is None:
            detail = f"{len(wanted)} rows of row group {group} from {min(wanted)} on: {wrong}"[:200]
            yield Sample(raw.uri, "", group, 0, reason="unreadable_archive", detail=detail)
            return
        for index in range(batch.num_rows):
            if row + index in wanted:
                wanted.discard(row + index)
                yield from _read_row(batch, index, raw.uri, image, (f"{image}/{row + index}", group), max_bytes)
        row += batch.num_rows


def _read_row(
    batch: pa.RecordBatch, index: int, uri: str, image: str, place: tuple[str, int], max_bytes: int
) -> Iterator[Sample]:
    fields: dict[str, Any] = {}
    wrong: list[str] = []
    for name in batch.schema.names:
        if name == image:
            continue
        try:
            fields[name] = plain(batch.column(name)[index].as_py())
        except Exception as error:
            # Text that is not UTF-8, dates beyond Python's: nothing checked them before.
            wrong.append(f"column `{name}`: {type(error).__name__}: {error}")
            continue
        if isinstance(fields[name], str) and len(fields[name]) > MAX_BYTES:
            wrong.append(f"column `{name}`: {len(fields.pop(name))} characters, more than {MAX_BYTES}")
    if wrong:
        yield Sample(uri, *place, 0, reason="bad_metadata", detail="; ".join(wrong)[:200])
    data = image_bytes(batch.column(image)[index].as_py())
    if len(data) > max_bytes:
        detail = f"{len(data)} > {max_bytes} (ingest.max_bytes)"
        yield Sample(uri, *place, len(data), reason="too_many_bytes", detail=detail)
    else:
        yield Sample(uri, *place, len(data), data=data, metadata=from_fields(fields) if fields else Metadata())


def _batches(raw: Bytes, image: str, group: int) -> Iterator[pa.RecordBatch]:
    footer = pq.ParquetFile(raw)
    # Scalars only: vectors and nested or binary values are no metadata.
    columns = [image, *(f.name for f in footer.schema_arrow if f.name != image and _is_scalar(f.type))]
    meta = footer.metadata.row_group(group)
    rows = _BATCH_BYTES * max(1, meta.num_rows) // max(1, _bytes_of(meta, columns))
    # Copied from its dictionary into a batch, one large value that a page refers to a thousand times would fill memory. Values
    # of other columns would be gathered into a dictionary of the whole row group, so they are read as they are.
    repeated = [c.path_in_schema for c in _chunks(meta, columns) if _is_mostly_dictionary(c)]
    file = pq.ParquetFile(raw, buffer_size=_READ_BYTES, pre_buffer=False, read_dictionary=repeated)
    yield from file.iter_batches(
        batch_size=min(max(1, rows), _BATCH_ROWS), row_groups=[group], columns=columns, use_threads=False
    )


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
    return [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]


def image_bytes(cell: Any) -> bytes:
    """An image cell: bytes, a struct with `bytes` (Hugging Face datasets), or nothing."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    return cell if isinstance(cell, bytes) else b""
