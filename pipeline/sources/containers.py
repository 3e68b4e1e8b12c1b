"""The kinds of files that hold images: how each is recognized, how its members are listed, and how their bytes are read.

A new kind is a `Container` in a file of its own and one line in `LISTED` (docs/extending.md).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lodeset.pipeline.sources.files import Bytes
from lodeset.pipeline.sources.members import Member, Sample

if TYPE_CHECKING:
    from lodeset.pipeline.sources.listing import SourceFile
    from lodeset.pipeline.sources.slices import Slice

LISTED = (
    "lodeset.pipeline.sources.tars:TAR",
    "lodeset.pipeline.sources.parquet:PARQUET",
    "lodeset.pipeline.sources.zips:ZIP",
    "lodeset.pipeline.sources.compressed:GZIP_TAR",
    "lodeset.pipeline.sources.compressed:ZSTANDARD_TAR",
    "lodeset.pipeline.sources.lists:CSV",
    "lodeset.pipeline.sources.lists:JSON_LINES",
)

LOOSE = "loose"  # the kind of a file that is an image itself, or none
Alive = Callable[[], None]  # called now and then by what reads for long without giving anything


class UnreadableMember(Exception):
    """The bytes of one member cannot be had, and that is a property of the archive: the reason and detail of its reject."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Reader(Protocol):
    """An opened container."""

    def read(self, member: str, offset: int, size_bytes: int, first: int) -> bytes:
        """The `first` bytes of a member of `size_bytes` bytes, both as its listing says.

        Raises:
            UnreadableMember: the archive does not hold what its listing promises.
            LodesetError: the file system does not give the file.
        """

    def close(self) -> None: ...


class Ranges:
    """Members are ranges of the file, as they stand."""

    def __init__(self, uri: str, alive: Alive = lambda: None) -> None:
        self._file = Bytes(uri)

    def read(self, member: str, offset: int, size_bytes: int, first: int) -> bytes:
        return self._file.read_at(offset, first)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, kw_only=True)
class Container:
    """One kind of file that holds images.

    Attributes:
        kind: its name in slices and messages.
        suffixes: what names of such files end with, in lower case.
        members: lists what a file holds, by its headers, in the order in which the bytes lie. Whatever it raises but a LodesetError
            makes the file one refused member.
        opened: opens a file to read members in that order, by their names and offsets.
        read: reads a slice, where that is more than `opened` member by member.
        version: raised when members are listed or read in another way; part of the fingerprint of every set that holds such a
            file. 0: as lodeset 0.1.0 reads them.
        sidecars: members may describe one another (`0001.json` beside `0001.jpg`).
        image_column: `image:` names the column of images.
        grouped: members of the same offset are read together.
        sequential: going back reads the file from its start. A file is cut into `most_slices` at most, each of which costs a
            pass over all that lies before it.
        elsewhere: members are files of their own, and this file is only a list of them. It counts where a source names it, not
            where it lies in a folder that is read.
        expansion: bytes of images for each byte of the file, roughly; speed only.
    """

    kind: str
    suffixes: tuple[str, ...]
    members: Callable[[Bytes, SourceFile], Iterator[Member]]
    opened: Callable[[str, Alive], Reader] = Ranges
    read: Callable[[Slice, int], Iterator[Sample]] | None = None
    check: Callable[[Slice], None] | None = None
    version: int = 1
    sidecars: bool = True
    image_column: bool = False
    grouped: bool = False
    sequential: bool = False
    most_slices: int = 1
    elsewhere: bool = False
    expansion: int = 1


@functools.cache
def containers() -> Sequence[Container]:
    """Every kind, in the order of `LISTED`."""
    found: list[Container] = []
    for reference in LISTED:
        module, _, name = reference.partition(":")
        found.append(getattr(importlib.import_module(module), name))
    return tuple(found)


@functools.cache
def container_of(kind: str) -> Container | None:
    """The container of this kind; None for loose files."""
    return next((one for one in containers() if one.kind == kind), None)


def recognized(path: str) -> Container | None:
    """What a file is by its name; None for a loose file. Of several suffixes that fit, the longest counts."""
    name = path.lower()
    fitting = ((len(suffix), one) for one in containers() for suffix in one.suffixes if name.endswith(suffix))
    return max(fitting, key=lambda pair: pair[0], default=(0, None))[1]


def suffixes() -> tuple[str, ...]:
    """What the names of all these files end with."""
    return tuple(suffix for one in containers() for suffix in one.suffixes)
