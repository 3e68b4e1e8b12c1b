"""The tables of a run: which there are, and their rows."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from lodeset.infra.looking.trace import columns_of
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.tables.records import LARGE

# What a table is written as, by the end of the file's name.
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
    found = []
    for id_, artifact in artifacts.items():
        for name, files in artifact.tables.items():
            held = [file for file in files if file.path.endswith(".parquet")]
            if held:
                rows = sum(file.rows for file in held)
                found.append(Listed(id_, name, rows, tuple(columns_of(store, held[0])), tuple(held)))
    return found


def chosen(tables: list[Listed], name: str, of: str | None) -> list[Listed]:
    """Tables of a name, of all stages or of one (`dedup`, `ingest/pool`).

    Raises:
        ConfigError: there is none; or they have different columns, so that they cannot be one.
    """
    found = [
        t
        for t in tables
        if t.table == name and of in (None, t.stage, t.stage.partition("/")[0], t.stage.partition("/")[2])
    ]
    if not found:
        names = ", ".join(dict.fromkeys(f"{t.table} ({t.stage})" for t in tables)) or "none yet"
        raise ConfigError(f"no table {name}{f' of {of}' if of else ''} in this run; there are: {names}")
    if len({t.columns for t in found}) > 1:
        raise ConfigError(
            f"several stages have a table {name}: say which with --of ({', '.join(t.stage for t in found)})"
        )
    return found


def batches(store: Store, tables: list[Listed], where: Mapping[str, str]) -> Iterator[pa.Table]:
    """The rows, a file at a time, whose columns hold these values as text.

    Raises:
        ConfigError: there is no such column.
    """
    for name in where:
        if name not in tables[0].columns:
            raise ConfigError(f"--where {name}: no such column; there are: {', '.join(tables[0].columns)}")
    for table in tables:
        for file in table.files:
            rows = store.table([file])
            for name, value in where.items():
                rows = rows.filter(pc.fill_null(pc.equal(pc.cast(rows[name], pa.string()), value), False))
            if rows.num_rows:
                yield rows


def first(found: Iterator[pa.Table], count: int) -> list[dict[str, Any]]:
    """The first rows, as JSON can hold them; without pictures, vectors and maps, which nobody reads."""
    rows: list[dict[str, Any]] = []
    for table in found:
        small = table.drop_columns([name for name in LARGE if name in table.column_names])
        rows += [
            {key: _json(value) for key, value in row.items()} for row in small.slice(0, count - len(rows)).to_pylist()
        ]
        if len(rows) >= count:
            break
    return rows


def _json(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def write(found: Iterator[pa.Table], path: Path) -> int:
    """Writes all rows, whole or not at all, and returns how many there are; where there is none, nothing is written.

    Raises:
        ConfigError: the file's name ends in no format that is known.
        LodesetError: it cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out {path}: the name must end in {', '.join(FORMATS)}")
    tables = list(found)
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
