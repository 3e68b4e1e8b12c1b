"""The tables of a run: their names, and their rows."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from lodeset.infra.looking.trace import columns_of
from lodeset.pipeline.dag.store import Artifact, File, Part, Store
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.tables.records import LARGE

# File formats by the ending of the file's name.
FORMATS = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True)
class Listed:
    """One table of one stage."""

    stage: str
    table: str
    rows: int
    columns: tuple[str, ...]
    files: tuple[File, ...]


def listed(store: Store, artifacts: Mapping[str, Artifact]) -> list[Listed]:
    """Every table that has rows, in the order of the DAG."""
    tables = []
    for id_, artifact in artifacts.items():
        for name, files in artifact.tables.items():
            parquet = [file for file in files if file.path.endswith(".parquet")]
            if parquet:
                tables.append(_listed(store, id_, name, parquet))
    return tables


def listed_part(store: Store, stage: str, part: Part) -> list[Listed]:
    """The tables of a part that no artifact lists."""
    return [_listed(store, stage, name, [file]) for name, file in part.files.items()]


def _listed(store: Store, stage: str, name: str, files: Sequence[File]) -> Listed:
    return Listed(stage, name, sum(file.rows for file in files), tuple(columns_of(store, files[0])), tuple(files))


def chosen(tables: list[Listed], name: str, of: str | None) -> list[Listed]:
    """The tables with a name, of all stages or of one (`dedup`, `ingest/pool`).

    Raises:
        ConfigError: there is no such table, or their columns differ, so that they cannot be shown as one.
    """
    matches = [
        t
        for t in tables
        if t.table == name and of in (None, t.stage, t.stage.partition("/")[0], t.stage.partition("/")[2])
    ]
    if not matches:
        names = ", ".join(dict.fromkeys(f"{t.table} ({t.stage})" for t in tables)) or "none yet"
        raise ConfigError(f"no table {name}{f' of {of}' if of else ''} in this run; its tables are: {names}")
    if len({t.columns for t in matches}) > 1:
        raise ConfigError(
            f"several stages have a table {name}: choose one with --of ({', '.join(t.stage for t in matches)})"
        )
    return matches


def batches(store: Store, tables: list[Listed], where: Mapping[str, str]) -> Iterator[pa.Table]:
    """The rows whose columns have these values as text, a file at a time.

    Raises:
        ConfigError: there is no such column.
    """
    for name in where:
        if name not in tables[0].columns:
            raise ConfigError(f"--where {name}: no such column; the columns are: {', '.join(tables[0].columns)}")
    for table in tables:
        for file in table.files:
            rows = store.table([file])
            for name, value in where.items():
                rows = rows.filter(pc.fill_null(pc.equal(pc.cast(rows[name], pa.string()), value), False))
            if rows.num_rows:
                yield rows


def first(tables: Iterator[pa.Table], count: int) -> list[dict[str, Any]]:
    """The first rows in a form that JSON can hold; without pictures, vectors and maps, which are not readable."""
    rows: list[dict[str, Any]] = []
    for table in tables:
        small = table.drop_columns([name for name in LARGE if name in table.column_names])
        rows += [
            {key: _json(value) for key, value in row.items()} for row in small.slice(0, count - len(rows)).to_pylist()
        ]
        if len(rows) >= count:
            break
    return rows


def _json(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def write(tables_read: Iterator[pa.Table], path: Path) -> int:
    """Write all rows, completely or not at all, and return their number; if there are none, nothing is written.

    Raises:
        ConfigError: the file's name has no known ending.
        LodesetError: the file cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out {path}: the name must end in {', '.join(FORMATS)}")
    tables = list(tables_read)
    if not tables:
        return 0
    table = pa.concat_tables(tables, promote_options="permissive")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        _write(table, temporary, path.suffix.lower())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LodesetError(f"cannot write {shown(str(path))}: {error.strerror or error}") from error
    return int(table.num_rows)


def _write(table: pa.Table, path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pq.write_table(table, path, compression="zstd")
        return
    nested = [field.name for field in table.schema if pa.types.is_nested(field.type) or pa.types.is_binary(field.type)]
    if suffix == ".csv":
        pyarrow.csv.write_csv(table.drop_columns(nested), path)
        return
    with path.open("w", encoding="utf-8") as file:
        for row in table.to_pylist():
            file.write(json.dumps({key: _json(value) for key, value in row.items()}, ensure_ascii=False) + "\n")
