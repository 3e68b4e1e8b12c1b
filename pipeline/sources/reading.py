"""Bytes out of sources, in the order in which they lie."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lodeset.pipeline.algorithms.images.decoding import image_id
from lodeset.pipeline.algorithms.images.stripping import without_location
from lodeset.pipeline.errors import LodesetError, source_replaced
from lodeset.pipeline.sources.files import Bytes, changed
from lodeset.pipeline.sources.members import Member, Sample
from lodeset.pipeline.sources.metadata import MAX_BYTES, BadMetadata, fields_of, from_fields, partition_fields
from lodeset.pipeline.sources.packed import HEAD_BYTES, packed_as
from lodeset.pipeline.sources.parquet import Cells, read_rows
from lodeset.pipeline.sources.slices import Slice

# More than file systems read ahead: sidecars beside their image lie nearer.
_FAR_BYTES = 16 * 2**20


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
            fields: list[Mapping[str, Any]] = [partition_fields(f"{files.piece.uri}/{member.name}")]
            for sidecar in member.sidecars:
                try:
                    fields.append(files.fields(sidecar, member))
                except BadMetadata as error:
                    if not sidecar.shared:
                        yield Sample(*files.place(sidecar), reason="bad_metadata", detail=str(error)[:200])
            here = files.place(member)
            if member.reason:
                yield Sample(*here, reason=member.reason, detail=member.detail)
                continue
            large = member.size_bytes > max_bytes
            data = files.read(member, member, HEAD_BYTES if large else None)
            packed = packed_as(data)
            if packed:
                yield Sample(*here, reason="archive", detail=packed)
            elif large:
                detail = f"{member.size_bytes} > {max_bytes} (ingest.max_bytes)"
                yield Sample(*here, reason="too_many_bytes", detail=detail)
            else:
                yield Sample(*here, data=data, metadata=from_fields(*fields))


class _Open:
    """The file of a tar slice, kept open; the files of a loose slice, opened one by one."""

    def __init__(self, piece: Slice) -> None:
        self.piece = piece
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> _Open:
        if self.piece.kind == "tar":
            self._tar = self._opened.enter_context(Bytes(self.piece.uri))
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @functools.cached_property
    def _far(self) -> Bytes:
        """The tar once more: between members that lie far apart, one file would read ahead in vain each time."""
        return self._opened.enter_context(Bytes(self.piece.uri))

    def place(self, member: Member) -> tuple[str, str, int, int]:
        """What tells a member from all others: uri, member, offset; and its size."""
        if self.piece.kind == "tar":
            return (self.piece.uri, member.name, member.offset, member.size_bytes)
        return (f"{self.piece.root}/{member.name}", "", 0, member.size_bytes)

    def read(self, member: Member, beside: Member, head: int | None = None) -> bytes:
        """The bytes of a member, or the first of them; `beside` is the image that is being read."""
        size = member.size_bytes if head is None else min(head, member.size_bytes)
        if self.piece.kind == "tar":
            file = self._tar if abs(member.offset - beside.offset) < _FAR_BYTES else self._far
            return file.read_at(member.offset, size)
        uri = f"{self.piece.root}/{member.name}"
        with Bytes(uri) as file:
            if file.size_bytes != member.size_bytes:
                raise changed(uri, member.size_bytes, file.size_bytes)
            return file.read_at(0, size)

    def fields(self, sidecar: Member, image: Member) -> dict[str, Any]:
        if sidecar.size_bytes > MAX_BYTES:
            raise BadMetadata(f"{sidecar.size_bytes} bytes, more than {MAX_BYTES}")
        return fields_of(sidecar.extension, self.read(sidecar, image))


def read_images(locations: Iterable[Location]) -> Iterator[tuple[Location, bytes]]:
    """The bytes of each location, in the order given; a file stays open, and a batch of Parquet rows in memory, while in use.

    Raises:
        LodesetError: the bytes are no longer those that were ingested.
    """
    with contextlib.ExitStack() as opened:
        file: Bytes | None = None
        cells: Cells | None = None
        for place in locations:
            if file is None or place.uri != file.uri:
                opened.close()
                file, cells = opened.enter_context(Bytes(place.uri)), None
            if "/" in place.member and place.uri.lower().endswith(".parquet"):
                column, row = place.member.rsplit("/", 1)
                try:
                    if cells is None or cells.image != column:
                        cells = Cells(file, column)
                    data = cells.read(place.offset, row)
                except LodesetError:
                    raise
                except Exception as error:
                    # It was read before, so that whatever the parser says means that the file is another one now.
                    raise source_replaced(place.uri, " ".join(str(error).split())[:200]) from error
            else:
                data = file.read_at(place.offset, place.size_bytes)
            if image_id(data) != place.image_id and image_id(stripped := without_location(data)) == place.image_id:
                data = stripped  # as ingest took it in (`ingest.strip_location`)
            if image_id(data) != place.image_id:
                where = f"{place.member} at {place.offset}".strip()
                raise source_replaced(place.uri, f"{where}: image {place.image_id} expected, {image_id(data)} found")
            yield place, data
