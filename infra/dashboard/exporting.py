"""Images as a file: image_ids, a table, or a folder that FiftyOne opens. `found` are their rows of `inspected`, rising."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.site import number_of
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables import records

Rows = NDArray[np.int32]
# Where a file lies within the artifacts is of no use outside.
COLUMNS = tuple(name for name in records.INSPECTED.names if name not in ("picture_file", "picture_row", "row"))
PICTURES = 50_000  # the most images that a file for FiftyOne has
PIECE = 2**20
# What a spreadsheet would take for a formula.
FORMULA = r"^[=+\-@\t\r]"


def list_of_ids(data: Data, found: Rows, link: str) -> Iterator[str]:
    """Image_ids as a list by hand, each of them once, with a head that says what they are."""
    ids = data.image_ids(found)
    distinct = [one for n, one in enumerate(ids) if n == 0 or ids[n - 1] != one]  # rows are in the order of image_ids
    yield f"# {len(distinct):,} images of run {number_of(data)}\n# {' '.join(link.split())}\n"
    for start in range(0, len(distinct), 10_000):
        yield "".join(f"{one}\n" for one in distinct[start : start + 10_000])


def csv(data: Data, found: Rows) -> Iterator[bytes]:
    """A table as CSV. Texts that a spreadsheet would take for a formula get a `'` before them."""
    head = True
    for table in _tables(data, found):
        buffer = io.BytesIO()
        pyarrow.csv.write_csv(_guarded(table), buffer, pyarrow.csv.WriteOptions(include_header=head))
        head = False
        yield buffer.getvalue()


def _guarded(table: pa.Table) -> pa.Table:
    for n, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            table = table.set_column(n, field.name, _plain(table[field.name]))
    return table


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    risky = pc.fill_null(pc.match_substring_regex(column, FORMULA), False)
    return pc.if_else(risky, pc.binary_join_element_wise("'", column, ""), column)


def parquet(data: Data, found: Rows) -> Iterator[bytes]:
    """A table as Parquet, with `x` and `y` of the map, and no lists in its columns."""

    def write(file: IO[bytes]) -> None:
        writer = None
        for table in _tables(data, found):
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None
        writer.close()

    return _written(write)


def fiftyone(data: Data, found: Rows) -> Iterator[bytes]:
    """A zip with `labels.csv` and thumbnails in `data`, which is the layout of FiftyOne's `CSVDataset`.

    Raises:
        LodesetError: there are more images than such a file is good for.
    """
    if len(found) > PICTURES:
        raise LodesetError(
            f"{len(found):,} images are more than the {PICTURES:,} that a file for FiftyOne can have: choose fewer, or "
            "export Parquet"
        )
    files, numbers = data.column("picture_file"), data.column("picture_row")

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w") as packed:
            head = True
            with packed.open("labels.csv", "w") as labels:
                for table in _tables(data, found):
                    paths = pc.binary_join_element_wise(table["image_id"], ".webp", "")
                    table = _guarded(table.add_column(0, "filepath", paths))
                    pyarrow.csv.write_csv(table, labels, pyarrow.csv.WriteOptions(include_header=head))
                    head = False
            before = ""
            for row, image_id in zip(found.tolist(), data.image_ids(found), strict=True):
                picture = data.thumbnail(int(files[row]), int(numbers[row])) if files[row] >= 0 else None
                if picture is not None and image_id != before:
                    packed.writestr(f"data/{image_id}.webp", picture)
                    before = image_id

    return _written(write)


def _tables(data: Data, found: Rows) -> Iterator[pa.Table]:
    """The rows in pieces; at least one piece, which may be empty."""
    names = list(COLUMNS)
    schema = pa.schema(
        [pa.field(f.name, pa.string()) if f.name == "selected_for" else f for f in records.INSPECTED if f.name in names]
    )
    yield schema.empty_table()
    for batch, start in data.batches(names):
        here = found[(found >= start) & (found < start + batch.num_rows)] - start
        if len(here):
            table = pa.Table.from_batches([batch]).take(pa.array(here))
            at = table.schema.get_field_index("selected_for")
            table = table.set_column(at, "selected_for", pc.binary_join(table["selected_for"], ";"))
            yield table.cast(schema)


def _written(write: Callable[[IO[bytes]], None]) -> Iterator[bytes]:
    """What is written into a file that is gone afterwards, piece by piece."""
    file = tempfile.TemporaryFile(prefix="lodeset-export-")  # noqa: SIM115  closed when it was sent
    try:
        write(file)
        file.seek(0)
    except BaseException:
        file.close()
        raise

    def pieces() -> Iterator[bytes]:
        with file:
            while piece := file.read(PIECE):
                yield piece

    return pieces()


# name -> (what makes it, its type, the end of its name)
Maker = Callable[[Data, Rows], Iterator[bytes]]
FORMATS: Mapping[str, tuple[Maker, str, str]] = {
    "csv": (csv, "text/csv; charset=utf-8", "csv"),
    "parquet": (parquet, "application/vnd.apache.parquet", "parquet"),
    "fiftyone": (fiftyone, "application/zip", "zip"),
}
