"""Bytes out of sources, in the order in which they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.algorithms.images import image_id
from pipeline.errors import LodesetError
from pipeline.sources.files import Bytes, changed, unescaped
from pipeline.sources.members import Member, Sample
from pipeline.sources.metadata import MAX_BYTES, BadMetadata, fields_of, from_fields
from pipeline.sources.parquet import image_bytes, read_rows
from pipeline.sources.slices import Slice


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

    Raises:
        LodesetError: the file system does not give what was listed.
    """
    if piece.kind == "parquet":
        yield from read_rows(piece.uri, piece.image, piece.members, max_bytes)
        return
    with _Open(piece) as files:
        for member in piece.members:
            fields: dict[str, Any] = {}
            for sidecar in member.sidecars:
                try:
                    fields |= files.fields(sidecar)
                except BadMetadata as error:
                    if not sidecar.shared:
                        yield Sample(*files.place(sidecar), reason="bad_metadata", detail=str(error)[:200])
            here = files.place(member)
            if member.reason:
                yield Sample(*here, reason=member.reason, detail=member.detail)
            elif member.size_bytes > max_bytes:
                detail = f"{member.size_bytes} > {max_bytes} (ingest.max_bytes)"
                yield Sample(*here, reason="too_many_bytes", detail=detail)
            else:
                yield Sample(*here, data=files.read(member), metadata=from_fields(fields))


class _Open:
    """The file of a tar slice, kept open; the files of a loose slice, opened one by one."""

    def __init__(self, piece: Slice) -> None:
        self.piece = piece
        self._tar: Bytes | None = None

    def __enter__(self) -> _Open:
        if self.piece.kind == "tar":
            self._tar = Bytes(self.piece.uri)
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()

    def place(self, member: Member) -> tuple[str, str, int, int]:
        """What tells a member from all others: uri, member, offset; and its size."""
        if self._tar is not None:
            return (self.piece.uri, member.name, member.offset, member.size_bytes)
        return (f"{self.piece.root}/{member.name}", "", 0, member.size_bytes)

    def read(self, member: Member) -> bytes:
        if self._tar is not None:
            return self._tar.read_at(member.offset, member.size_bytes)
        uri = f"{self.piece.root}/{member.name}"
        with Bytes(uri) as file:
            if file.size_bytes != member.size_bytes:
                raise changed(uri, member.size_bytes, file.size_bytes)
            return file.read()

    def fields(self, sidecar: Member) -> dict[str, Any]:
        if sidecar.size_bytes > MAX_BYTES:
            raise BadMetadata(f"{sidecar.size_bytes} bytes, more than {MAX_BYTES}")
        return fields_of(sidecar.extension, self.read(sidecar))


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
                    uri, file = place.uri, cast(IO[bytes], fsspec.open(unescaped(place.uri), "rb").open())
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
