"""The members of a tar by its headers, whatever state it is in.

Python's reader takes a damaged header, or blocks of zeros, for the end. Here reading goes on: zeros are skipped (archives that
were concatenated), and after damage the next valid header is looked for.
"""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import IO, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.containers import Container
from lodeset.pipeline.sources.files import escaped
from lodeset.pipeline.sources.members import Member

_BLOCK = tarfile.BLOCKSIZE
_SCAN_BYTES = 2**20
# Extended headers hold names and attributes; a crafted one may ask for all the file.
_HEADER_BYTES = 2**20
# What file systems take as a path; a header may hold one of a megabyte.
_NAME = 4_096
_CHECKSUM = slice(148, 156)
_OCTAL = np.zeros(256, bool)
_OCTAL[list(b"01234567 \0")] = True


class Seekable(Protocol):
    """What listing a tar needs of a file."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


def tar_members(raw: Seekable, size_bytes: int) -> Iterator[Member]:
    """The members in their order; links, devices and every range of bytes that could not be read come with a reason."""
    if not size_bytes:
        yield Member("", 0, 0, "unreadable_archive", "0 bytes")
    at: int = 0
    broken: Member | None = None
    while at < size_bytes or broken is not None:
        damaged, start = _next_header(raw, at, size_bytes)
        if broken is None and damaged is not None:
            broken = Member("", damaged, 0, "unreadable_archive", "no tar header")
        if broken is not None:
            detail = f"bytes {broken.offset} to {start}: {broken.detail}"[:200]
            yield replace(broken, size_bytes=start - broken.offset, detail=detail)
        at, broken = size_bytes, None
        if start < size_bytes:
            at, broken = yield from _until_broken(raw, start, size_bytes)


def _until_broken(raw: Seekable, start: int, size_bytes: int) -> Generator[Member, None, tuple[int, Member | None]]:
    """The members from a valid header on; returns where to look for the next one, and what broke, if anything did."""
    at = start
    raw.seek(start)
    headers = cast(IO[bytes], _Headers(raw))
    try:
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while at < size_bytes:
                entry = tar.next()
                if entry is None and at == start:
                    raise tarfile.ReadError("invalid extended header")
                if entry is None:
                    return at, None
                name, data, after = escaped(entry.name[:_NAME]), entry.offset_data, tar.offset
                regular = entry.isreg() and entry.sparse is None
                # A negative size would send the reader round in circles (CVE-2025-8194).
                if entry.size < 0 or after < data:
                    detail = f"a header promises {entry.size} bytes"
                    return data, Member(name, entry.offset, 0, "unreadable_archive", detail)
                if after - size_bytes >= _BLOCK or (regular and data + entry.size > size_bytes):
                    return data, Member(name, data, 0, "truncated", f"{entry.size} bytes were promised")
                if regular and len(entry.name) > _NAME:
                    yield Member(name, data, 0, "unreadable_archive", f"a name of {len(entry.name)} characters")
                elif regular:
                    yield Member(name, data, entry.size)
                elif not entry.isdir():
                    yield Member(name, data, 0, "not_a_file", f"tar entry of type {entry.type!r}")
                at = after
                # tarfile keeps every member it has seen; a billion-member crawl must not. It also copies what a global header
                # says into every later member: a thousand members times a name of 100 kB.
                tar.members = []  # type: ignore[attr-defined]  # public in CPython, not in its stubs
                tar.pax_headers = {}
        return at, None
    except LodesetError:
        raise
    except Exception as error:
        # The parser raises anything on crafted headers. What it has read is not read again, or they would cost quadratic time.
        detail = f"{type(error).__name__}: {error}"
        return max(at + _BLOCK, headers.tell()), Member("", at, 0, "unreadable_archive", detail)


class _Headers:
    """A file from which only headers are read."""

    def __init__(self, raw: Seekable) -> None:
        self.seek, self.tell, self._read = raw.seek, raw.tell, raw.read

    def read(self, size: int) -> bytes:
        if size > _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _next_header(raw: Seekable, at: int, size_bytes: int) -> tuple[int | None, int]:
    """Where the first block lies that is neither zeros nor a header (if any before it), and the first valid header (or the end)."""
    damaged: int | None = None
    length = _BLOCK  # nearly always the very first block is one
    while at < size_bytes:
        raw.seek(at)
        data = raw.read(min(length, size_bytes - at))
        whole = len(data) // _BLOCK
        blocks = np.frombuffer(data, np.uint8, whole * _BLOCK).reshape(whole, _BLOCK)
        filled: NDArray[np.bool_] = np.any(blocks, axis=1)
        plausible = filled & _OCTAL[blocks[:, _CHECKSUM]].all(axis=1)
        found = next((int(i) for i in np.flatnonzero(plausible) if _is_header(blocks[i].tobytes())), None)
        dirty = np.flatnonzero(filled[:found])
        if damaged is None and dirty.size:
            damaged = at + int(dirty[0]) * _BLOCK
        if found is not None:
            return damaged, at + found * _BLOCK
        if damaged is None and any(data[whole * _BLOCK :]):
            damaged = at + whole * _BLOCK
        at, length = at + max(_BLOCK, len(data)), _SCAN_BYTES
    return damaged, size_bytes


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


TAR = Container(kind="tar", suffixes=(".tar",), version=0, members=lambda raw, file: tar_members(raw, file.size_bytes))
