"""Opening sources: the names that tables hold, and bytes for parsers.

An archive's parser raises anything on crafted bytes, and that is a counted reject. What the file system says (a time-out, a
missing right) is no property of the bytes: it must stop the run, or it would be committed as one.
"""

from __future__ import annotations

import io
import re
import stat
from pathlib import Path
from types import TracebackType
from typing import IO, cast

from fsspec.implementations.local import LocalFileSystem

from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote.file_system import file_system

# Python holds the byte 0xNN of a name that is not UTF-8 as U+DCNN, which neither Arrow nor JSON can store.
_NOT_UTF8 = re.compile(r"[\udc80-\udcff]|\\(?=x[0-9a-f]{2})")
_ESCAPE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")


def escaped(name: str) -> str:
    r"""The name as valid UTF-8: a byte that is none becomes `\xNN`, and a backslash that would be read so `\x5c`."""
    return _NOT_UTF8.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", name)


def unescaped(name: str) -> str:
    """The name as the file system knows it."""
    return _ESCAPE.sub(lambda match: "\\" if match[1] == "5c" else chr(0xDC00 + int(match[1], 16)), name)


def open_source(uri: str) -> IO[bytes]:
    """A listed file, opened for reading. `fsspec.open` would take `::` in a name for a chain of file systems."""
    name = unescaped(uri)
    fs, _ = file_system(name.partition("::")[0])
    # Opening a pipe would wait for its other end.
    if isinstance(fs, LocalFileSystem) and not stat.S_ISREG(Path(fs._strip_protocol(name)).stat().st_mode):
        raise OSError("no file any more, but a folder, pipe, socket or device")
    return cast(IO[bytes], fs.open(name, "rb"))


class Bytes:
    """The bytes of one source, as a file for parsers.

    Whatever the file system raises becomes a LodesetError, so all else that a parser raises is about the bytes. Offsets and
    sizes from crafted headers never reach the file system.
    """

    closed = False

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            self._file = open_source(uri)
            self.size_bytes = self._file.seek(0, io.SEEK_END)
            self._file.seek(0)
        except Exception as error:
            raise cannot_be_read(uri, error) from error

    def __enter__(self) -> Bytes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size_bytes - self._file.tell())
        try:
            return self._file.read(left if size < 0 else min(size, left))
        except Exception as error:
            raise cannot_be_read(self.uri, error) from error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._file.tell(), io.SEEK_END: self.size_bytes}[whence]
        if not 0 <= start + offset <= self.size_bytes:
            raise ValueError(f"offset {start + offset} in a file of {self.size_bytes} bytes")
        return self._file.seek(start + offset)

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly these bytes, which a listing promised.

        Raises:
            LodesetError: the file ends before.
        """
        if offset + size > self.size_bytes:
            raise changed(self.uri, offset + size, self.size_bytes)
        self.seek(offset)
        data = self.read(size)
        if len(data) < size:
            raise changed(self.uri, offset + size, offset + len(data))
        return data

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


def cannot_be_read(uri: str, error: Exception) -> LodesetError:
    """What to tell of a source that the file system does not give."""
    if isinstance(error, FileNotFoundError):
        return LodesetError(f"{uri} is gone since it was listed: put it back, or run again without it")
    if isinstance(error, PermissionError):
        return LodesetError(f"{uri} may not be read: give this user the right to, or take it out of the source")
    said = " ".join(str(error).split())[:200] or "no message"
    return LodesetError(
        f"{uri} cannot be read now ({type(error).__name__}: {said}): nothing was recorded about it; run again once it can"
    )


def changed(uri: str, listed: int, found: int) -> LodesetError:
    return LodesetError(f"{uri} changed since it was listed ({listed} bytes then, {found} now): run again")
