"""Bytes out of sources, in the order in which they lie."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.algorithms.images import image_id
from pipeline.errors import LodesetError
from pipeline.sources.metadata import MAX_BYTES, BadMetadata, Metadata, fields_of, from_fields
from pipeline.sources.slices import Member, Slice


@dataclass(frozen=True)
class Sample:
    """One member with its bytes, or (`reason`) why there are none."""

    uri: str
    member: str
    offset: int
    size_bytes: int
    data: bytes = b""
    reason: str = ""
    detail: str = ""
    metadata: Metadata = field(default_factory=Metadata)


@dataclass(frozen=True)
class Location:
    """Where an image's bytes lie: a row of the `locations` table."""

    image_id: str
    uri: str
    member: str
    offset: int
    size_bytes: int


def read_slice(piece: Slice, max_bytes: int) -> Iterator[Sample]:
    """Every member of a slice that is (or should be) an image, one at a time, with its sidecars' metadata.

    Bad sidecars, and sidecars without an image, are yielded as refused samples: every file is accounted for.
    """
    if piece.kind == "parquet":
        yield from _read_rows(piece, max_bytes)
        return
    sidecars: dict[str, dict[str, Member]] = {}
    images: dict[str, int] = {}
    said: dict[str, Metadata] = {}
    for member in piece.members:
        if member.reason:
            continue
        if member.is_sidecar:
            sidecars.setdefault(member.sample, {})[posixpath.splitext(member.name.lower())[1]] = member
        else:
            images[member.sample] = images.get(member.sample, 0) + 1
    with _Open(piece) as files:
        for member in piece.members:
            uri, where = files.uri(member), "" if piece.kind == "loose" else member.name
            here = (uri, where, member.offset, member.size_bytes)
            if member.reason:
                yield Sample(*here, reason=member.reason, detail=member.detail)
            elif member.is_sidecar:
                if member.sample not in images:
                    yield Sample(*here, reason="metadata_without_image", detail="no image shares its name")
            elif member.size_bytes > max_bytes:
                yield Sample(
                    *here, reason="too_many_bytes", detail=f"{member.size_bytes} > {max_bytes} (ingest.max_bytes)"
                )
            else:
                if member.sample not in said:
                    said[member.sample], bad = _metadata(files, sidecars.get(member.sample, {}))
                    yield from bad
                try:
                    yield Sample(*here, data=files.read(member), metadata=said[member.sample])
                except OSError as error:
                    yield Sample(*here, reason="unreadable", detail=f"{type(error).__name__}: {error}"[:200])


def _metadata(files: _Open, sidecars: Mapping[str, Member]) -> tuple[Metadata, list[Sample]]:
    """What the sidecars of one sample say together, and those that cannot be read."""
    fields: dict[str, Any] = {}
    bad: list[Sample] = []
    for extension, member in sorted(sidecars.items()):
        try:
            if member.size_bytes > MAX_BYTES:
                raise BadMetadata(f"{extension} of {member.size_bytes} bytes, more than {MAX_BYTES}")
            fields |= fields_of(extension, files.read(member))
        except (BadMetadata, OSError) as error:
            where = "" if files.piece.kind == "loose" else member.name
            bad.append(
                Sample(
                    files.uri(member),
                    where,
                    member.offset,
                    member.size_bytes,
                    reason="bad_metadata",
                    detail=str(error)[:200],
                )
            )
    return from_fields(fields), bad


class _Open:
    """The file of a tar slice, kept open; the files of a loose slice, opened one by one."""

    def __init__(self, piece: Slice) -> None:
        self.piece = piece
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Open:
        if self.piece.kind == "tar":
            try:
                self._file = cast(IO[bytes], fsspec.open(self.piece.uri, "rb").open())
            except OSError as error:
                raise LodesetError(
                    f"{self.piece.uri} was listed and cannot be opened now ({error}): put it back or correct the configuration, and run again"
                ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def uri(self, member: Member) -> str:
        return self.piece.uri if self.piece.kind == "tar" else f"{self.piece.root}/{member.name}"

    def read(self, member: Member) -> bytes:
        if self._file is not None:
            self._file.seek(member.offset)
            return self._file.read(member.size_bytes)
        with fsspec.open(self.uri(member), "rb") as file:
            return cast(bytes, file.read())


def _read_rows(piece: Slice, max_bytes: int) -> Iterator[Sample]:
    refused = [m for m in piece.members if m.reason]
    for member in refused:
        yield Sample(
            piece.uri, member.name, member.offset, member.size_bytes, reason=member.reason, detail=member.detail
        )
    if refused:
        return
    group = piece.members[0].offset
    try:
        with fsspec.open(piece.uri, "rb") as raw:
            table = pq.ParquetFile(raw).read_row_group(group)
    except (OSError, pa.ArrowException) as error:
        for member in piece.members:
            detail = f"row group {group}: {type(error).__name__}: {error}"[:200]
            yield Sample(piece.uri, member.name, group, member.size_bytes, reason="unreadable", detail=detail)
        return
    images = table.column(piece.image)
    others = table.drop_columns([piece.image])
    # Scalars only: vectors and nested images are no metadata.
    kept = [
        f.name
        for f in others.schema
        if not (pa.types.is_nested(f.type) or pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type))
    ]
    fields = others.select(kept).to_pylist() if kept else [{}] * table.num_rows
    for row in range(table.num_rows):
        data = image_bytes(images[row].as_py())
        here = (piece.uri, f"{piece.image}/{row}", group, len(data))
        if len(data) > max_bytes:
            yield Sample(*here, reason="too_many_bytes", detail=f"{len(data)} > {max_bytes} (ingest.max_bytes)")
        else:
            yield Sample(*here, data=data, metadata=from_fields(fields[row]))


def image_bytes(cell: Any) -> bytes:
    """An image cell: bytes, a struct with `bytes` (Hugging Face datasets), or nothing."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    return cell if isinstance(cell, bytes) else b""


def read_images(locations: Iterable[Location]) -> Iterator[tuple[Location, bytes]]:
    """The bytes of each location, in the order given; files and Parquet row groups stay open while they are in use.

    Raises:
        LodesetError: the bytes are no longer those that were ingested.
    """
    uri, file = "", cast(IO[bytes], None)
    group: tuple[str, int, str] | None = None
    cells: pa.ChunkedArray = pa.chunked_array([], pa.binary())
    try:
        for place in locations:
            try:
                if place.uri != uri:
                    if file is not None:
                        file.close()
                    uri, file = place.uri, cast(IO[bytes], fsspec.open(place.uri, "rb").open())
                if "/" in place.member and uri.lower().endswith(".parquet"):
                    column, row = place.member.rsplit("/", 1)
                    if group != (uri, place.offset, column):
                        cells = pq.ParquetFile(file).read_row_group(place.offset, columns=[column]).column(0)
                        group = (uri, place.offset, column)
                    data = image_bytes(cells[int(row)].as_py())
                else:
                    file.seek(place.offset)
                    data = file.read(place.size_bytes)
            except (OSError, pa.ArrowInvalid, IndexError) as error:
                raise LodesetError(
                    f"{place.uri} cannot be read any more ({error}): if the data moved, correct the configuration and run again"
                ) from error
            if image_id(data) != place.image_id:
                raise LodesetError(
                    f"{place.uri} {place.member} at {place.offset}: the bytes changed since they were ingested "
                    f"(image {place.image_id} expected, {image_id(data)} found): run again, ingest will read the new ones"
                )
            yield place, data
    finally:
        if file is not None:
            file.close()
