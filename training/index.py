"""The training data: shards, the place of each image in them, and the curated sets that selected each image.

Shapes: n images of the index, S shards.
"""

import hashlib
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.utils import get_protocol
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.images.decoding import image_id
from lodeset.pipeline.config import Strict
from lodeset.pipeline.dag.files import reaching
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote.file_system import Remote, file_system, opened
from lodeset.pipeline.shown import shown
from lodeset.pipeline.sources.files import unescaped

INDEX_COLUMNS = ("image_id", "shard", "offset", "size_bytes")


class Shards(Strict):
    """Paths or fsspec URLs, all on one file system."""

    index: tuple[str, ...]  # index.parquet files
    selected: tuple[str, ...] = ()  # tables of the sets that selected each image; needed for weighting sets


@dataclass(frozen=True)
class ShardIndex:
    """The place of each image's bytes, in 32 bytes of memory per image: shards (URLs) and columns of n rows."""

    shards: tuple[str, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size_bytes: NDArray[np.int32]
    ids: NDArray[np.uint8]  # [n, 16], the bytes behind the 32 hex digits

    def __len__(self) -> int:
        return len(self.shard)

    def image_id(self, row: int) -> str:
        return bytes(self.ids[row]).hex()

    def digest(self) -> str:
        """SHA-256 of the image ids in their order: identifies the training images wherever they are stored."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()

    def extents(self) -> NDArray[np.int64]:
        """Bytes of each shard up to the end of its last image, [S]."""
        extents = np.zeros(len(self.shards), np.int64)
        np.maximum.at(extents, self.shard, self.offset + self.size_bytes)
        return extents

    def read(self, rows: Sequence[int]) -> list[bytes | None]:
        """Encoded bytes of these rows; None for rows that cannot be read, are truncated, or do not match their id (a
        damaged shard: most of its images can still be decoded).
        """
        if not rows:
            return []
        filesystem, _ = file_system(self.shards[0])
        starts = [int(self.offset[row]) for row in rows]
        ends = [start + int(self.size_bytes[row]) for start, row in zip(starts, rows, strict=True)]
        urls = [self.shards[self.shard[row]] for row in rows]
        # Remote file systems fetch the ranges concurrently; a failed range is returned as its exception.
        payloads = filesystem.cat_ranges(urls, starts, ends, on_error="return")
        images = [self._image(row, payload) for row, payload in zip(rows, payloads, strict=True)]
        if isinstance(filesystem, Remote):
            # What came may not be what is there.
            wrong = [n for n, payload in enumerate(payloads) if images[n] is None and isinstance(payload, bytes)]
            again = filesystem.cat_ranges(
                [urls[n] for n in wrong], [starts[n] for n in wrong], [ends[n] for n in wrong]
            )
            for n, payload in zip(wrong, again, strict=True):
                images[n] = self._image(rows[n], payload)
        return images

    def _image(self, row: int, payload: object) -> bytes | None:
        return payload if isinstance(payload, bytes) and image_id(payload) == self.image_id(row) else None


def open_index(urls: Sequence[str]) -> ShardIndex:
    """Read `index.parquet` files. Rows are ordered by image_id, so that training does not depend on which shard holds
    which image.

    Raises:
        LodesetError: no file is given, a file or column is missing, or an image_id is not 32 hex digits.
    """
    if not urls:
        raise LodesetError("no index.parquet given: training needs at least one")
    shards: list[str] = []
    columns: dict[str, list[NDArray[np.generic]]] = {name: [] for name in INDEX_COLUMNS}
    for url in urls:
        try:
            with reaching(shown(url)):
                filesystem, path = file_system(url)
            with reaching(shown(url)), filesystem.open(path, "rb") as file:
                # 10^8 names exceed the size of one Arrow string array.
                table = pq.read_table(file, columns=list(INDEX_COLUMNS), read_dictionary=["shard"])
            _check(table)
        except FileNotFoundError as error:
            raise LodesetError(f"{url} does not exist: check the path, or run write_shards first") from error
        except (pa.ArrowException, OSError, ValueError) as error:
            raise LodesetError(f"{url} is not an index with the columns {', '.join(INDEX_COLUMNS)}: {error}") from error
        names = table["shard"].unify_dictionaries().combine_chunks()
        folder = path.rsplit("/", 1)[0]
        columns["shard"].append(names.indices.to_numpy(zero_copy_only=False).astype(np.int32) + len(shards))
        shards += [_shard_url(filesystem, folder, name) for name in names.dictionary.to_pylist()]
        columns["offset"].append(table["offset"].to_numpy().astype(np.int64))
        columns["size_bytes"].append(table["size_bytes"].to_numpy().astype(np.int32))
        columns["image_id"].append(_parse_ids(table["image_id"], url))
    protocols = sorted({get_protocol(shard) for shard in shards})
    if len(protocols) > 1:
        raise LodesetError(
            f"shards are on {len(protocols)} file systems ({', '.join(protocols)}), but training reads from one: copy "
            "them to the same one"
        )
    ids = np.concatenate(columns["image_id"]).astype(np.uint8)
    high, low = ids.view(">u8").T
    order = np.lexsort((low, high))
    return ShardIndex(
        shards=tuple(shards),
        shard=np.concatenate(columns["shard"])[order].astype(np.int32),
        offset=np.concatenate(columns["offset"])[order].astype(np.int64),
        size_bytes=np.concatenate(columns["size_bytes"])[order].astype(np.int32),
        ids=ids[order],
    )


def _check(table: pa.Table) -> None:
    """Raise ValueError for values that no index contains."""
    for name in INDEX_COLUMNS:
        if table[name].null_count:
            raise ValueError(f"{table[name].null_count} rows have no {name}")
    for name, least, limit in (("offset", 0, 2**62), ("size_bytes", 1, 2**31)):
        if not pa.types.is_integer(table[name].type):
            raise ValueError(f"{name} is {table[name].type}, not an integer")
        extremes = pc.min_max(table[name]).as_py()
        if len(table) and not least <= extremes["min"] <= extremes["max"] < limit:
            raise ValueError(f"{name} goes from {extremes['min']} to {extremes['max']}, outside {least} to {limit - 1}")


def _shard_url(filesystem: Any, folder: str, name: str) -> str:
    """URL of a shard of an index in `folder`; a full name is used as it is, on whatever file system."""
    if name.startswith("/") or "://" in name:
        return str(unescaped(name))
    # `../<folder>/<shard>` belongs to an earlier run; object stores do not resolve it.
    return str(filesystem.unstrip_protocol(posixpath.normpath(f"{folder}/{name}")))


def _parse_ids(column: pa.ChunkedArray, url: str) -> NDArray[np.uint8]:
    parsed = [np.empty((0, 16), np.uint8)]
    for chunk in column.chunks:
        ids = chunk.to_pylist()
        try:
            raw = bytes.fromhex("".join(ids))
        except (ValueError, TypeError) as error:
            raise LodesetError(f"{url}: an image_id is not 32 hex digits: {error}") from error
        if any(len(image_id) != 32 for image_id in ids):
            raise LodesetError(f"{url}: an image_id is not 32 hex digits")
        parsed.append(np.frombuffer(raw, np.uint8).reshape(-1, 16))
    return np.concatenate(parsed)


def weights_of(index: ShardIndex, selected: Sequence[str], mix: Mapping[str, float]) -> NDArray[np.float64]:
    """How often an epoch shows each image, [n]: the value in `mix` of the set that selected it, or once if there is
    none.

    An image that several sets selected gets the largest of their values. `selected`: tables with image_id and set.

    Raises:
        LodesetError: no table is given, or one cannot be read.
    """
    if not selected:
        raise LodesetError("training.mix weights images by the set that selected them: give the table `selected` too")
    tables = []
    for url in selected:
        try:
            with opened(url) as file:
                tables.append(pq.read_table(file, columns=["image_id", "set"], read_dictionary=["set"]))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise LodesetError(f"{url} is not a table with the columns image_id and set: {error}") from error
    wanted = pa.concat_tables(tables)
    sets = wanted["set"].unify_dictionaries().combine_chunks()
    weight_of = np.array([mix.get(name, 1.0) for name in sets.dictionary.to_pylist()], np.float64)
    row_weights = weight_of[sets.indices.to_numpy(zero_copy_only=False)]
    ids = _as_keys(_parse_ids(wanted["image_id"], ", ".join(selected)))
    order = np.lexsort((-row_weights, ids))
    ids, row_weights = ids[order], row_weights[order]  # the largest weight first
    known = _as_keys(index.ids)
    places = np.searchsorted(ids, known)
    weights = np.ones(len(index))
    places[places == len(ids)] = 0
    named = ids[places] == known if len(ids) else np.zeros(len(index), np.bool_)
    weights[named] = row_weights[places[named]]
    return weights


def _as_keys(ids: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """[n, 16] bytes -> [n] sortable values. NumPy pads such values with zero bytes, but here all have the same
    length.
    """
    return np.ascontiguousarray(ids).view("S16").reshape(-1)
