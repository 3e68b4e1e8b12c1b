"""Bytes out of sources, in the order in which they lie."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lodeset.pipeline.algorithms.images.decoding import image_id
from lodeset.pipeline.algorithms.images.stripping import without_location
from lodeset.pipeline.errors import LodesetError, source_replaced
from lodeset.pipeline.sources.containers import (
    Alive,
    Container,
    Ranges,
    Reader,
    UnreadableMember,
    container_of,
    recognized,
)
from lodeset.pipeline.sources.files import Bytes, changed
from lodeset.pipeline.sources.members import Member, Sample
from lodeset.pipeline.sources.metadata import MAX_BYTES, BadMetadata, fields_of, from_fields, partition_fields
from lodeset.pipeline.sources.packed import HEAD_BYTES, packed_as
from lodeset.pipeline.sources.slices import Slice

# More than file systems read ahead: sidecars beside their image lie nearer.
_FAR_BYTES = 16 * 2**20
# Sidecars of a slice that do not lie beside their images, held in memory where going back would read the file from its start.
_HELD_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Location:
    """Where an image's bytes lie: a row of the `locations` table."""

    image_id: str
    uri: str
    member: str
    offset: int
    size_bytes: int


def read_slice(piece: Slice, max_bytes: int, alive: Alive = lambda: None) -> Iterator[Sample]:
    """Every member of a slice that is (or should be) an image, one at a time, with its sidecars' metadata.

    Bad sidecars, and sidecars without an image, are yielded as refused samples: every file is accounted for. `alive` is called
    now and then while nothing is yielded for long.

    Raises:
        LodesetError: the file system does not give what was listed.
    """
    container = container_of(piece.kind)
    if container is not None and container.read is not None:
        yield from container.read(piece, max_bytes)
        return
    with contextlib.closing(_Loose(piece) if container is None else _Packed(piece, container, alive)) as files:
        for member in piece.members:
            fields: list[Mapping[str, Any]] = [partition_fields(f"{piece.uri}/{member.name}")]
            here = files.place(member)
            read = files.unit(member, max_bytes)
            for sidecar in member.sidecars:
                try:
                    fields.append(fields_of(sidecar.extension, read(sidecar)))
                except (BadMetadata, UnreadableMember) as error:
                    if not sidecar.shared:
                        yield Sample(*files.place(sidecar), reason="bad_metadata", detail=str(error)[:200])
            if member.reason:
                yield Sample(*here, reason=member.reason, detail=member.detail)
                continue
            try:
                data = read(member)
            except UnreadableMember as error:
                yield Sample(*here, reason=error.reason, detail=error.detail[:200])
                continue
            yield sample_of(here, data, fields, max_bytes)


def sample_of(
    place: tuple[str, str, int, int], data: bytes, fields: Sequence[Mapping[str, Any]], max_bytes: int
) -> Sample:
    """One image with what was said about it, unless its first bytes (all, if it has no more than `max_bytes`) speak against it."""
    size_bytes = place[3]
    packed = packed_as(data)
    if packed:
        return Sample(*place, reason="archive", detail=packed)
    if size_bytes > max_bytes:
        return Sample(*place, reason="too_many_bytes", detail=f"{size_bytes} > {max_bytes} (ingest.max_bytes)")
    return Sample(*place, data=data, metadata=from_fields(*fields))


def needed(member: Member, max_bytes: int) -> int:
    """How many of an image's bytes `sample_of` needs."""
    return member.size_bytes if member.size_bytes <= max_bytes else HEAD_BYTES


class _Loose:
    """Files of their own, opened one by one."""

    def __init__(self, piece: Slice) -> None:
        self._root = piece.root

    def place(self, member: Member) -> tuple[str, str, int, int]:
        """What tells a member from all others: uri, member, offset; and its size."""
        return (f"{self._root}/{member.name}", "", 0, member.size_bytes)

    def unit(self, image: Member, max_bytes: int) -> Callable[[Member], bytes]:
        """What reads an image, or the first bytes of one that is too large, and its sidecars."""
        return lambda member: self._read(member, _wanted(member, image, max_bytes))

    def _read(self, member: Member, size: int) -> bytes:
        uri = f"{self._root}/{member.name}"
        with Bytes(uri) as file:
            if file.size_bytes != member.size_bytes:
                raise changed(uri, member.size_bytes, file.size_bytes)
            return file.read_at(0, size)

    def close(self) -> None: ...


class _Packed:
    """Members of one file, which stays open."""

    def __init__(self, piece: Slice, container: Container, alive: Alive) -> None:
        self._piece, self._container, self._alive = piece, container, alive
        self._opened = contextlib.ExitStack()
        self._held = self._apart() if container.sequential else {}

    @functools.cached_property
    def _near(self) -> Reader:
        return self._open()

    @functools.cached_property
    def _far(self) -> Reader:
        """The file once more: between members that lie far apart, one file would read ahead in vain each time."""
        return self._open()

    def _open(self) -> Reader:
        return self._opened.enter_context(contextlib.closing(self._container.opened(self._piece.uri, self._alive)))

    def close(self) -> None:
        self._opened.close()

    def place(self, member: Member) -> tuple[str, str, int, int]:
        return (self._piece.uri, member.name, member.offset, member.size_bytes)

    def unit(self, image: Member, max_bytes: int) -> Callable[[Member], bytes]:
        if not self._container.sequential:
            return lambda member: self._read(member, image, max_bytes)
        # In the order in which they lie, whichever is asked for first.
        found: dict[int, bytes | Exception] = {}
        for member in sorted((image, *image.sidecars), key=lambda m: m.offset):
            if (member is not image or not image.reason) and member.offset not in self._held:
                try:
                    found[member.offset] = self._read(member, image, max_bytes)
                except (BadMetadata, UnreadableMember) as error:
                    found[member.offset] = error
        return lambda member: _given((found if member.offset in found else self._held)[member.offset])

    def _read(self, member: Member, image: Member, max_bytes: int) -> bytes:
        size = _wanted(member, image, max_bytes)
        near = self._container.sequential or abs(member.offset - image.offset) < _FAR_BYTES
        return (self._near if near else self._far).read(member.name, member.offset, member.size_bytes, size)

    def _apart(self) -> dict[int, bytes | Exception]:
        """The sidecars by which reading in order would have to go back, read in a pass of their own."""
        images = [m.offset for m in self._piece.members if not m.reason]
        following = iter([*images[1:], float("inf")])
        reached, apart = -1, dict[int, Member]()
        for member in self._piece.members:
            if member.reason:
                continue
            before = next(following)
            beside = [s for s in member.sidecars if reached < s.offset < before]
            apart.update({s.offset: s for s in member.sidecars if s not in beside})
            reached = max(member.offset, *(s.offset for s in beside)) if beside else member.offset
        held: dict[int, bytes | Exception] = {}
        if not apart:
            return held
        size = 0
        with contextlib.closing(self._container.opened(self._piece.uri, self._alive)) as reader:
            for offset, sidecar in sorted(apart.items()):
                size += sidecar.size_bytes
                try:
                    if size > _HELD_BYTES:
                        raise BadMetadata(
                            f"it and others that lie apart from their images have more than {_HELD_BYTES} bytes"
                        )
                    length = _wanted(sidecar, None, 0)
                    held[offset] = reader.read(sidecar.name, offset, sidecar.size_bytes, length)
                except (BadMetadata, UnreadableMember) as error:
                    held[offset] = error
        return held


def _given(found: bytes | Exception) -> bytes:
    if isinstance(found, Exception):
        raise found
    return found


def _wanted(member: Member, image: Member | None, max_bytes: int) -> int:
    """How many bytes to read of an image or of a sidecar.

    Raises:
        BadMetadata: a sidecar is too large.
    """
    if member is image:
        return needed(member, max_bytes)
    if member.size_bytes > MAX_BYTES:
        raise BadMetadata(f"{member.size_bytes} bytes, more than {MAX_BYTES}")
    return member.size_bytes


def read_images(locations: Iterable[Location]) -> Iterator[tuple[Location, bytes]]:
    """The bytes of each location, in the order given; a file stays open, and a batch of Parquet rows in memory, while in use.

    Ask for them by (uri, offset): going back in a compressed tar reads it from its start.

    Raises:
        LodesetError: the bytes are no longer those that were ingested.
    """
    with contextlib.ExitStack() as opened:
        file: Reader | None = None
        current: tuple[str, Callable[[str, Alive], Reader]] | None = None
        for place in locations:
            container = recognized(place.uri) if place.member else None
            needed = (place.uri, container.opened if container is not None else Ranges)
            if file is None or needed != current:
                opened.close()
                file, current = opened.enter_context(contextlib.closing(needed[1](place.uri, lambda: None))), needed
            try:
                data = file.read(place.member, place.offset, place.size_bytes, place.size_bytes)
            except LodesetError:
                raise
            except Exception as error:
                # It was read before, so that whatever the parser says means that the file is another one now.
                raise source_replaced(place.uri, " ".join(str(error).split())[:200]) from error
            if image_id(data) != place.image_id and image_id(stripped := without_location(data)) == place.image_id:
                data = stripped  # as ingest took it in (`ingest.strip_location`)
            if image_id(data) != place.image_id:
                where = f"{place.member} at {place.offset}".strip()
                raise source_replaced(place.uri, f"{where}: image {place.image_id} expected, {image_id(data)} found")
            yield place, data
