"""What was made of a run to be looked at, opened for reading: tables, columns, thumbnails, and dedup's pairs.

Queries run in a DuckDB that can read these files and nothing else, with limits on memory and time.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lodeset.infra.dashboard.making import THUMBNAILS, Inspected
from lodeset.infra.dashboard.remembered import remembered
from lodeset.pipeline.algorithms.images.decoding import ID_HEX_DIGITS
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.specs import DedupSpec
from lodeset.pipeline.stages.dedup.what_if import Compared, Joins, Setting
from lodeset.pipeline.stages.inspect import compared
from lodeset.pipeline.stages.inspect.graph import InspectDetails, InspectSpec
from lodeset.pipeline.tables.kept import fixed

MEMORY_MB = 512  # of DuckDB
STATEMENT_S = 10.0
BATCH = 65_536  # rows that are read at once for exports
COLUMNS = 64  # that stay in memory, which are all there are
FILES = 64  # of thumbnails that stay open
GROUPS = 256  # row groups of thumbnails in memory, of about 100 kB

TABLES = ("inspected", "by_cluster")


class SlowError(LodesetError):
    """A question took longer than pages may wait."""


@dataclass(frozen=True)
class Dedup:
    """What dedup compared in this run, to be judged again with other settings."""

    spec: DedupSpec
    images: Compared
    settings: tuple[Setting, ...]
    pool: int

    def node(self, image_id: str) -> int | None:
        """The number of an image; None if no pair names it."""
        ids = self.images.ids
        at = bisect.bisect_left(ids, image_id)
        return at if at < len(ids) and ids[at] == image_id else None

    def setting(self, name: str) -> Setting:
        """Raises LodesetError: this configuration has no such setting."""
        for setting in self.settings:
            if setting.name == name:
                return setting
        known = ", ".join(setting.name for setting in self.settings) or "none"
        raise LodesetError(f"{name} decides nothing in this run; what does: {known}")


class Data:
    """One inspected run. Threads may share it.

    It closes its database and deletes its temporary files once nothing refers to it, if nobody has closed it before.

    Attributes:
        kept: what others compute of these data, which goes with them.
    """

    def __init__(self, store: Store, inspected: Inspected) -> None:
        self.store, self.inspected = store, inspected
        self.kept: dict[str, Any] = {}
        self._left = contextlib.ExitStack()
        self.close = weakref.finalize(self, self._left.close)
        self._fetching: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._local = store.local
        self._folder = Path(store.path("")) if store.local else self._temporary()
        artifact = inspected.artifact
        self.details = read_as(InspectDetails, artifact.details)
        self._files = {name: self.path_of(files[0]) for name, files in artifact.tables.items()}
        self._scratch = self._temporary()
        self._database = _locked(self._scratch, {name: self._files[name] for name in TABLES})
        self._left.callback(self._database.close)
        pictures = inspected.made.get(THUMBNAILS)
        self._thumbnails = tuple(pictures.tables["thumbnails"]) if pictures is not None else ()

    def _temporary(self) -> Path:
        return Path(self._left.enter_context(tempfile.TemporaryDirectory(prefix="lodeset-inspect-")))

    def path_of(self, file: File) -> Path:
        """A file of the store on this machine: a copy, if the store is elsewhere."""
        path = self._folder / file.path
        if self._local:
            self.store.check(file)
            return path
        with self._lock:
            fetching = self._fetching.setdefault(file.path, threading.Lock())
        with fetching:  # one request fetches it, and the others wait for the whole of it
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f"{path.name}.part")
                self.store.fetch(file, part)
                os.replace(part, path)
        return path

    def warm(self) -> None:
        """Reads what most pages need, which is then there when the first of them is opened."""
        for name in ("picture_file", "picture_row", "x", "y", "cluster"):
            self.column(name)
        for name in ("set", "outcome"):
            self.codes(name)
        self.rows_of("")
        if self.dedup is not None:
            for setting in self.dedup.settings:
                self.joins(setting.name)

    @property
    def sets(self) -> Mapping[str, str]:
        """The part that each set plays."""
        return read_as(InspectSpec, self.inspected.artifact.config).sets

    # -- tables

    def query(self, sql: str, parameters: Sequence[Any] = (), tables: Mapping[str, pa.Table] | None = None) -> pa.Table:
        """The answer of the database, which knows `inspected`, `by_cluster` and the given tables.

        Raises:
            SlowError: it took more than STATEMENT_S.
        """
        with self._lock:
            cursor = self._database.cursor()
        return _answer(cursor, sql, parameters, tables or {})

    def with_later(self, later: Data, sql: str) -> pa.Table:
        """The answer of a database that knows the `inspected` of this run as `before`, and that of another one as `after`.

        Raises:
            SlowError: it took more than STATEMENT_S.
        """
        name = "inspected"
        with contextlib.closing(
            _locked(self._scratch, {"before": self._files[name], "after": later._files[name]})
        ) as database:
            return _answer(database.cursor(), sql, (), {})

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """`query` as dictionaries."""
        found: list[dict[str, Any]] = self.query(sql, parameters).to_pylist()
        return found

    @remembered(COLUMNS)
    def column(self, name: str) -> NDArray[Any]:
        """A column of `inspected` [N], in the order of its rows: numbers, NaN where there is none."""
        table = pq.read_table(self._files["inspected"], columns=[name])
        return np.asarray(table[name].to_numpy())

    @remembered(COLUMNS)
    def codes(self, name: str) -> tuple[tuple[str, ...], NDArray[np.int32]]:
        """A column of few different texts: these, sorted, and the number [N] of each row's (-1: null)."""
        table = pq.read_table(self._files["inspected"], columns=[name], read_dictionary=[name])
        column = table[name].combine_chunks()
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        values = encoded.dictionary.to_pylist()
        order = sorted(range(len(values)), key=lambda n: values[n])
        place = np.empty(len(values) + 1, np.int32)
        place[order], place[-1] = np.arange(len(values)), -1
        indices = encoded.indices.fill_null(len(values)).to_numpy()
        return tuple(values[n] for n in order), place[indices]

    @functools.cached_property
    def _ids(self) -> NDArray[np.bytes_]:
        """The image_ids of `inspected` [N], 32 bytes each."""
        return fixed(pq.read_table(self._files["inspected"], columns=["image_id"])["image_id"])

    def rows_of(self, image_id: str) -> range:
        """The numbers of the rows of an image: one for each set that holds it."""
        wanted = np.bytes_(image_id.encode("ascii", "replace"))
        first, last = (int(np.searchsorted(self._ids, wanted, side=side)) for side in ("left", "right"))
        return range(first, last)

    def rows_in(self, ids: Sequence[str], set_: str) -> NDArray[np.int32]:
        """The row of each image in a set; -1 where the set lacks it."""
        names, codes = self.codes("set")
        wanted = np.array(ids, f"S{ID_HEX_DIGITS}")
        found = np.searchsorted(self._ids, wanted)
        code = names.index(set_) if set_ in names else -2
        for _ in names:  # an image has a row for each of its sets, in their order
            at = found.clip(max=max(len(self._ids) - 1, 0))
            found = np.where((self._ids[at] == wanted) & (codes[at] != code), found + 1, found)
        at = found.clip(max=max(len(self._ids) - 1, 0))
        here = (found < len(self._ids)) & (self._ids[at] == wanted) & (codes[at] == code)
        return np.where(here, at, -1).astype(np.int32)

    def beginning(self, prefix: str, most: int) -> list[str]:
        """The distinct image_ids that begin with a text, at most so many."""
        low, high = (np.bytes_(prefix.ljust(ID_HEX_DIGITS, fill).encode("ascii", "replace")) for fill in "0f")
        first = int(np.searchsorted(self._ids, low, side="left"))
        last = int(np.searchsorted(self._ids, high, side="right"))
        found = np.unique(self._ids[first : min(last, first + most * (len(self.sets) + 1))])
        return [one.decode() for one in found[:most].tolist()]

    def image_ids(self, rows: NDArray[np.int32]) -> list[str]:
        """The image_ids of rows."""
        found: list[str] = np.char.decode(self._ids[rows], "ascii").tolist()
        return found

    def batches(self, names: list[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
        """The rows of `inspected` in order, some at a time, with the number of the first of them."""
        start = 0
        with pq.ParquetFile(self._files["inspected"]) as file:
            for batch in file.iter_batches(BATCH, columns=names):
                yield batch, start
                start += batch.num_rows

    # -- thumbnails

    def thumbnail(self, file: int, row: int) -> bytes | None:
        """The WebP of a row of `inspected`, by its `picture_file` and `picture_row`; None where none was made."""
        if not 0 <= file < len(self._thumbnails):
            return None
        wanted = self._thumbnails[file]
        opened, starts = self._opened(wanted)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        pictures = self._group(wanted, group) if 0 <= row < opened.metadata.num_rows else ()
        return pictures[row - int(starts[group])] if pictures else None

    @remembered(FILES)
    def _opened(self, file: File) -> tuple[pq.ParquetFile, NDArray[np.int64]]:
        opened = pq.ParquetFile(self.path_of(file))
        sizes = [opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups)]
        return opened, np.cumsum([0, *sizes[:-1]])

    @remembered(GROUPS)
    def _group(self, file: File, number: int) -> tuple[bytes | None, ...]:
        opened, _ = self._opened(file)
        with self._lock:  # a file has one position
            table = opened.read_row_group(number, columns=["picture"])
        return tuple(table["picture"].to_pylist())

    # -- dedup

    @functools.cached_property
    def dedup(self) -> Dedup | None:
        """None before dedup."""
        artifact = self.inspected.held.artifacts.get("dedup/pool")
        if artifact is None or "compared" not in self._files:
            return None
        images = compared.read_table(pq.read_table(self._files["compared"]))
        settings = tuple(Setting(**setting) for setting in self.details.settings)
        return Dedup(read_as(DedupSpec, artifact.config), images, settings, self.details.pool or 0)

    @remembered(COLUMNS)
    def joins(self, setting: str) -> Joins:
        """The joins of a setting of dedup."""
        return compared.read_joins(pq.read_table(self._files["joins"], filters=[("setting", "=", setting)]), setting)

    @functools.cached_property
    def pairs(self) -> pa.Table:
        """The pairs of dedup without their maps; `a` and `b` are rows of `dedup.images`."""
        names = [name for name in pq.read_schema(self._files["pairs"]).names if name != "map"]
        return pq.read_table(self._files["pairs"], columns=names)

    def edge(self, a: str, b: str) -> dict[str, Any] | None:
        """The stored pair of two images, with its map, as `edges` has it; None where there is none."""
        dedup = self.dedup
        if dedup is None:
            return None
        a, b = sorted((a, b))
        numbers = [dedup.node(image_id) for image_id in (a, b)]
        if None in numbers:
            return None
        here = pq.read_table(self._files["pairs"], filters=[("a", "=", numbers[0]), ("b", "=", numbers[1])])
        rows = here.to_pylist()
        return {**rows[0], "image_id_a": a, "image_id_b": b} if rows else None

    def artifact(self, id_: str) -> Artifact | None:
        """Another artifact of the run."""
        return self.inspected.held.artifacts.get(id_)


def _answer(
    cursor: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[Any], tables: Mapping[str, pa.Table]
) -> pa.Table:
    done = threading.Event()

    def stop() -> None:
        done.set()
        cursor.interrupt()

    timer = threading.Timer(STATEMENT_S, stop)
    try:
        for name, table in tables.items():
            cursor.register(name, table)
        timer.start()
        return cursor.sql(sql, params=list(parameters)).to_arrow_table()
    except duckdb.InterruptException as error:
        if not done.is_set():
            raise
        raise SlowError(f"this question took more than {STATEMENT_S:.0f} s: ask for less at once") from error
    finally:
        timer.cancel()
        cursor.close()


def _locked(scratch: Path, tables: Mapping[str, Path]) -> duckdb.DuckDBPyConnection:
    """A database in memory that can read these tables, and no other file. What its memory cannot hold goes to `scratch`: by default
    it would go to the folder in which the dashboard was started.
    """
    database = duckdb.connect(config={"temp_directory": str(scratch)})
    for name, path in tables.items():
        database.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet({_quoted(str(path))})")
    allowed = ", ".join(_quoted(str(path)) for path in tables.values())
    for setting in (
        f"allowed_paths = [{allowed}]",
        "enable_external_access = false",
        f"memory_limit = '{MEMORY_MB}MB'",
        "threads = 2",
        "python_enable_replacements = false",
        "lock_configuration = true",
    ):
        database.execute(f"SET {setting}")
    return database


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@contextlib.contextmanager
def opened(store: Store, inspected: Inspected) -> Iterator[Data]:
    """The data of an inspected run, closed in the end."""
    data = Data(store, inspected)
    try:
        yield data
    finally:
        data.close()
