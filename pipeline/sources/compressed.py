"""Compressed tars, read as streams: nothing but their start can be found without decompressing all that lies before.

So a file is decompressed three times by ingest, however large it is: once to learn its size and whether it is sound, once to list
its members (the headers of a plain tar, by the offsets that it would have without compression), and once for its bytes. What
reads images again later decompresses it once for each part that needs some of them.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from typing import IO, cast

import pyarrow as pa

from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.containers import Alive, Container
from lodeset.pipeline.sources.files import Bytes, changed
from lodeset.pipeline.sources.listing import SourceFile
from lodeset.pipeline.sources.members import Member
from lodeset.pipeline.sources.tars import tar_members

# Always read by so many bytes from the start, so that a damaged stream ends at the same byte each time.
_CHUNK = 2**16
# What is kept behind the place that is read: the reader of headers goes back by less.
_KEPT_BYTES = 4 * 2**20
_ALIVE_BYTES = 64 * 2**20
# Tars of images hardly shrink. What claims to be so much larger than its bytes is made to fill memory or time.
_MOST_TIMES, _ALWAYS_BYTES = 200, 2**30
_MOST_SLICES = 4

Decompress = Callable[[Bytes], Callable[[], bytes]]  # of an opened file: what gives its next bytes, b"" at the end


def _gzip(raw: Bytes) -> Callable[[], bytes]:
    file = gzip.GzipFile(fileobj=cast(IO[bytes], raw), mode="rb")
    return lambda: file.read1(_CHUNK)


class _Open:
    """A file that pyarrow does not close when it is done with it."""

    closed = False

    def __init__(self, raw: Bytes) -> None:
        self.read = raw.read

    def readable(self) -> bool:
        return True

    def close(self) -> None: ...


def _zstandard(raw: Bytes) -> Callable[[], bytes]:
    file = pa.CompressedInputStream(pa.PythonFile(_Open(raw), "r"), "zstd")
    return lambda: bytes(file.read(_CHUNK))


class Stream:
    """A decompressed file that is read forward; going back by more than some megabytes starts again."""

    def __init__(self, raw: Bytes, decompress: Decompress, alive: Alive = lambda: None) -> None:
        self._raw, self._decompress, self._alive = raw, decompress, alive
        self._at = self._told = 0
        self._restart()

    def _restart(self) -> None:
        self._raw.seek(0)
        self._next = self._decompress(self._raw)
        self._kept, self._start = bytearray(), 0  # a piece of the stream, and where it starts

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (self._at if whence == io.SEEK_CUR else 0)
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Fewer bytes than asked for, where the stream ends."""
        if self._at < self._start:
            self._restart()
        end = self._at + size
        while self._start + len(self._kept) < end:
            chunk = self._next()
            if not chunk:
                break
            self._kept += chunk
            dropped = min(len(self._kept), self._at - _KEPT_BYTES - self._start)
            if dropped > 0:
                del self._kept[:dropped]
                self._start += dropped
            if self._start + len(self._kept) - self._told >= _ALIVE_BYTES:
                self._told = self._start + len(self._kept)
                self._alive()
        first = self._at - self._start
        data = bytes(memoryview(self._kept)[first : first + size])
        self._at += len(data)
        return data


def _members(decompress: Decompress, name: str, raw: Bytes, file: SourceFile) -> Iterator[Member]:
    """The members of the tar, as far as it can be decompressed."""
    most = max(_ALWAYS_BYTES, _MOST_TIMES * file.size_bytes)
    size_bytes, broken = _measured(decompress(raw), most)
    if size_bytes > most:
        raise ValueError(
            f"more than {most:,} bytes come out of {file.size_bytes:,}: if that is right, unpack it to a folder or a plain .tar"
        )
    if size_bytes:
        yield from tar_members(Stream(raw, decompress), size_bytes)
    if broken or not size_bytes:
        left = file.size_bytes if not size_bytes else 0
        yield Member(
            "", size_bytes, left, "unreadable_archive", f"{name} ends after {size_bytes} bytes: {broken}"[:200]
        )


def _measured(following: Callable[[], bytes], most: int) -> tuple[int, str]:
    """How many bytes a stream gives (a little more than `most` at most), and what ended it, if it is not its end."""
    size_bytes = 0
    try:
        while size_bytes <= most and (chunk := following()):
            size_bytes += len(chunk)
    except LodesetError:
        raise
    except Exception as error:
        return size_bytes, " ".join(str(error).split())
    return size_bytes, "" if size_bytes else "it is empty"


class _Compressed:
    """An opened compressed tar."""

    def __init__(self, uri: str, decompress: Decompress, alive: Alive) -> None:
        self._raw = Bytes(uri)
        self._stream = Stream(self._raw, decompress, alive)

    def read(self, member: str, offset: int, size_bytes: int, first: int) -> bytes:
        self._stream.seek(offset)
        data = self._stream.read(first)
        if len(data) < first:
            raise changed(self._raw.uri, offset + first, offset + len(data))
        return data

    def close(self) -> None:
        self._raw.close()


def compressed_tar(kind: str, suffixes: tuple[str, ...], name: str, decompress: Decompress) -> Container:
    """Tars in one more compression; `name` is for messages."""
    return Container(
        kind=kind,
        suffixes=suffixes,
        members=lambda raw, file: _members(decompress, name, raw, file),
        opened=lambda uri, alive: _Compressed(uri, decompress, alive),
        sequential=True,
        most_slices=_MOST_SLICES,
    )


GZIP_TAR = compressed_tar("tar.gz", (".tar.gz", ".tgz"), "the gzip stream", _gzip)
ZSTANDARD_TAR = compressed_tar("tar.zst", (".tar.zst", ".tzst"), "the Zstandard stream", _zstandard)
