"""Vectors that were made elsewhere: Parquet files with the key `image_id`, or `uri` (and `member`)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from lodeset.pipeline.embedders.config import PrecomputedEmbedder
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote.file_system import file_system

VERSION = 2  # of the results of `look_up`
# Reasons why an image has no vector.
NO_VECTOR, NULL, ZERO, SEVERAL = "no_vector", "null_vector", "zero_vector", "several_vectors"


@dataclass(frozen=True)
class VectorFile:
    """A Parquet file of vectors and the names of its columns; a missing key is None."""

    path: str
    fs: Any
    vector: str
    image_id: str | None
    uri: str | None
    member: str | None

    @contextlib.contextmanager
    def opened(self) -> Iterator[pq.ParquetFile]:
        try:
            with self.fs.open(self.path, "rb") as raw:
                yield pq.ParquetFile(raw)
        except (OSError, pa.ArrowException) as error:
            raise LodesetError(f"{self.path} cannot be read as Parquet: {error}") from error


@dataclass(frozen=True)
class Found:
    """Vectors of the rows that have one: float32 [M, D] and row numbers [M]; and the reasons why others have none."""

    vectors: NDArray[np.float32]
    rows: NDArray[np.int64]
    without: dict[str, int]


def files_of(config: PrecomputedEmbedder) -> tuple[Any, list[str]]:
    """The file system, and the sorted Parquet files that `path` stands for.

    Raises:
        LodesetError: there are no files.
    """
    # A path may contain the characters of a glob (`vec [v2]`) and the one with which URLs chain file systems.
    local = "://" not in config.path and "::" not in config.path
    fs, path = (LocalFileSystem(), config.path) if local else file_system(config.path)
    if fs.isdir(path):
        files = [name for name in fs.find(path) if name.lower().endswith(".parquet")]
    elif fs.exists(path):
        files = [path]
    else:
        files = [name for name in fs.glob(path) if fs.isfile(name)] if fsspec.core.has_magic(path) else []
    if not files:
        raise LodesetError(f"no precomputed vectors at {config.path}: give a Parquet file, a folder of them, or a glob")
    return fs, sorted(map(str, files))


def vector_files(config: PrecomputedEmbedder) -> list[VectorFile]:
    """The files after reading their schemas.

    Raises:
        LodesetError: a file is not Parquet, has no key column, or its vectors are not lists of numbers.
    """
    fs, paths = files_of(config)
    return [_described(fs, path, config) for path in paths]


def _described(fs: Any, path: str, config: PrecomputedEmbedder) -> VectorFile:
    with VectorFile(path, fs, "", None, None, None).opened() as file:
        schema = file.schema_arrow
    named = {name.lower(): name for name in reversed(schema.names)}
    vector = config.column if config.column in schema.names else named.get(config.column.lower())
    existing = ", ".join(schema.names)
    if vector is None:
        raise LodesetError(f"{path} has no column `{config.column}`; its columns are: {existing}: set `embed: column:`")
    kind = schema.field(vector).type
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if not _is_list(kind) or not _is_number(kind.value_type):
        advice = (
            ": np.frombuffer(cell, np.float32).tolist() makes a list of bytes that hold float32"
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
            else ""
        )
        raise LodesetError(
            f"{path}: the column `{vector}` holds {kind}, but vectors must be lists of numbers, such as "
            f"list<float>{advice}"
        )
    if "image_id" not in named and "uri" not in named:
        raise LodesetError(f"{path} has neither a column `image_id` nor a column `uri`; its columns are: {existing}")
    return VectorFile(path, fs, vector, named.get("image_id"), named.get("uri"), named.get("member"))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


@dataclass
class _Best:
    """The best match of a row so far: the kind of key (0: image_id, 1: uri), and its vector; None if that is null."""

    by: int
    vector: NDArray[np.float32] | None
    several: bool = False


@dataclass
class _Wanted:
    """The rows that a key stands for, for both kinds of keys."""

    by_id: dict[str, int] = field(default_factory=dict)
    by_name: dict[str, list[int]] = field(default_factory=dict)


def look_up(config: PrecomputedEmbedder, files: Sequence[VectorFile], wanted: pa.Table) -> Found:
    """Vectors of the rows of `wanted` (image_id, uri, member) that have one. An image_id takes precedence over a uri.

    A uri alone stands for a file; an image in an archive is `uri` with `member`, or `archive/member` as uri. Rows of a
    file that match no image are skipped. A null, a vector of zeros (which some producers write after failures) and
    different vectors for one image do not count as vectors.

    Raises:
        LodesetError: a file cannot be read, or vectors have several widths.
    """
    keys = _Wanted({row: at for at, row in enumerate(wanted["image_id"].to_pylist())})
    for at, (uri, member) in enumerate(zip(wanted["uri"].to_pylist(), wanted["member"].to_pylist(), strict=True)):
        keys.by_name.setdefault(_name(uri, member), []).append(at)
    best: dict[int, _Best] = {}
    for file in files:
        for by, at, vector in _matches(config, file, keys):
            known = best.get(at)
            if known is None or by < known.by:
                best[at] = _Best(by, vector)
            elif by == known.by and not _same(known.vector, vector):
                known.several = True
    return _found(config, best, wanted.num_rows)


def _same(first: NDArray[np.float32] | None, second: NDArray[np.float32] | None) -> bool:
    if first is None or second is None:
        return first is second
    return bool(np.array_equal(first, second, equal_nan=True))


def _found(config: PrecomputedEmbedder, best: dict[int, _Best], count: int) -> Found:
    without = {NO_VECTOR: count - len(best), NULL: 0, ZERO: 0, SEVERAL: 0}
    vectors: list[NDArray[np.float32]] = []
    rows: list[int] = []
    for at in sorted(best):
        match = best[at]
        if match.several:
            without[SEVERAL] += 1
        elif match.vector is None:
            without[NULL] += 1
        elif not match.vector.any():
            without[ZERO] += 1
        else:
            vectors.append(match.vector)
            rows.append(at)
    widths = sorted({len(vector) for vector in vectors})
    if len(widths) > 1:
        raise LodesetError(f"{config.path}: vectors have several widths: {widths[:5]}: one embedder has one width")
    matrix = np.stack(vectors) if vectors else np.zeros((0, 1), np.float32)
    return Found(matrix, np.array(rows, np.int64), {reason: n for reason, n in without.items() if n})


def _matches(
    config: PrecomputedEmbedder, file: VectorFile, keys: _Wanted
) -> Iterator[tuple[int, int, NDArray[np.float32] | None]]:
    """(kind of key, row of `wanted`, vector) for each row of a file that matches. Row groups without a match are not
    decoded.
    """
    columns = [name for name in (file.image_id, file.uri, file.member) if name is not None]
    ids, names = pa.array(keys.by_id, pa.string()), pa.array(keys.by_name, pa.string())
    with file.opened() as parquet:
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=columns)
            hits: list[tuple[int, int, int]] = []  # kind of key, row of the group, row of `wanted`
            if file.image_id is not None:
                ids_in_file = _ids(table[file.image_id])
                for at in _rows_in(ids_in_file, ids):
                    hits.append((0, at, keys.by_id[ids_in_file[at].as_py()]))
            if file.uri is not None:
                names_in_file = _names(table, file, config.folder)
                for at in _rows_in(names_in_file, names):
                    rows = keys.by_name[names_in_file[at].as_py()]
                    hits += [(1, at, row) for row in rows] if len(rows) == 1 else []
            if hits:
                vectors = parquet.read_row_group(group, columns=[file.vector])[file.vector]
                yield from ((by, row, _vector(vectors[at])) for by, at, row in hits)


def _rows_in(keys: pa.Array, wanted: pa.Array) -> list[int]:
    is_wanted = pc.fill_null(pc.is_in(keys, value_set=wanted), False)
    return list(np.flatnonzero(is_wanted.to_numpy(zero_copy_only=False)))


def _vector(cell: pa.Scalar) -> NDArray[np.float32] | None:
    """A list of numbers, in which a null is not finite; None for a missing or empty list."""
    values = getattr(cell, "value", cell)  # for an extension type, its storage
    values = getattr(values, "values", None)
    if values is None or len(values) == 0:
        return None
    with np.errstate(over="ignore"):  # values beyond float32 are not finite, and are counted as such
        return np.asarray(pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False), np.float32)


def _ids(column: pa.ChunkedArray) -> pa.Array:
    """image_ids in our form, 32 lower-case hex digits; 16 bytes and ids with hyphens are accepted."""
    column = column.combine_chunks()
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column, kind = column.storage, column.type.storage_type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        raw = column.to_pylist()
        return pa.array([None if cell is None else _text(cell) for cell in raw], pa.string())
    return pc.replace_substring(pc.utf8_lower(pc.cast(column, pa.string())), "-", "")


def _text(cell: bytes) -> str:
    return cell.hex() if len(cell) == 16 else cell.decode("utf-8", "replace").lower()


def _names(table: pa.Table, file: VectorFile, folder: str | None) -> pa.Array:
    """The uris of a file's rows with their members, in the form that `_name` gives to images."""
    assert file.uri is not None, "asked of files that have uris"
    uris = _strings(table[file.uri])
    uris = pc.replace_substring_regex(uris, r"^file://(localhost)?", "")
    if folder is not None:
        relative = pc.invert(pc.match_substring_regex(uris, r"^/|^[A-Za-z][A-Za-z0-9+.-]*:"))
        plain = pc.replace_substring_regex(uris, r"^(\./+)+", "")
        below = pc.binary_join_element_wise(pa.scalar(folder.rstrip("/")), plain, "/")
        uris = pc.if_else(relative, below, uris)
    if file.member is None:
        return uris
    members = pc.fill_null(_strings(table[file.member]), "")
    return pc.if_else(pc.equal(members, ""), uris, pc.binary_join_element_wise(uris, members, "/"))


def _strings(column: pa.ChunkedArray) -> pa.Array:
    return pc.cast(column.combine_chunks(), pa.string())


def _name(uri: str, member: str) -> str:
    return f"{uri}/{member}" if member else uri


def unmatched(config: PrecomputedEmbedder, files: Sequence[VectorFile], place: Mapping[str, str]) -> str:
    """An example key of both sides, if none of the keys match; `place` is one of the images."""
    file = files[0]
    columns = [name for name in (file.image_id, file.uri, file.member) if name is not None]
    with file.opened() as parquet:
        batch = next(parquet.iter_batches(1, columns=columns), None)
    if batch is None:
        return f"{file.path} has no rows"
    theirs = ", ".join(f"{name} {_shown(batch.column(name)[0])}" for name in columns)
    ours = f"image_id {place['image_id']}, uri {_name(place['uri'], place['member'])}"
    advice = ""
    if config.folder is None and any(file.uri is not None for file in files):
        advice = ": if the uris are relative, set `embed: folder:` to the folder that they start from"
    return f"the first key in {file.path} is {theirs}; the first image is {ours}{advice}"


def _shown(cell: pa.Scalar) -> str:
    return re.sub(r"[^ -~]", "?", str(cell.as_py()))[:200]
