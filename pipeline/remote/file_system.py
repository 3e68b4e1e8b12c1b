"""fsspec file systems whose requests are repeated while a server is slow, and whose answers have the right length.

A local file system is left as it is: nothing here comes between it and its caller.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lodeset.pipeline.remote import blocks
from lodeset.pipeline.remote.retries import WrongBytesError, patiently, repeated, silence_s, status_of

Result = TypeVar("Result")

# Calls that make requests. `open` is not among them: what it gives makes requests later.
_REQUESTS = frozenset(
    {
        "call_s3",
        "checksum",
        "created",
        "exists",
        "find",
        "get_file",
        "glob",
        "info",
        "isdir",
        "isfile",
        "ls",
        "makedirs",
        "modified",
        "mv",
        "put_file",
        "rm",
        "rm_file",
        "size",
        "walk",
    }
)
_BUFFER_BYTES = 2**17
_preparing = threading.Lock()


def file_system(url: str) -> tuple[Any, str]:
    """The file system that `url` names, and the path on it; remote ones are `Remote`. Nothing is read yet."""
    fs, path = fsspec.core.url_to_fs(url)
    return (fs if isinstance(fs, LocalFileSystem) else Remote(fs)), path


class Remote:
    """A remote file system. What is not defined here is the driver's own.

    Picklable wherever the driver is: fsspec's drivers are.
    """

    def __reduce__(self) -> tuple[type[Remote], tuple[Any]]:
        return Remote, (self.driver,)

    def __init__(self, fs: Any) -> None:
        self.driver = fs
        protocol = fs.protocol
        self.server = protocol if isinstance(protocol, str) else protocol[0]
        _prepare(fs, self.server)

    def __getattr__(self, name: str) -> Any:
        if name == "driver":  # while it is unpickled
            raise AttributeError(name)
        found = getattr(self.driver, name)
        return functools.partial(self._repeated, found) if name in _REQUESTS else found

    def _repeated(self, call: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        path = next((one for one in arguments if isinstance(one, str)), "")
        what = f"{getattr(call, '__name__', 'request')} {self.server}://{path}"
        return repeated(functools.partial(call, *arguments, **named), what, self.server)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **named: Any) -> bytes:
        """The bytes of a file, or start..end of it, fewer where it ends before."""
        if self.server == "s3" and start is None and end is None:
            # One request instead of two: s3fs would ask for the size first, to fetch large files in pieces.
            named.setdefault("max_concurrency", 1)

        def read() -> bytes:
            data: bytes = self.driver.cat_file(path, start=start, end=end, **named)
            if start is not None and end is not None and 0 <= start <= end and len(data) != end - start:
                # Fewer where the file ends, which is looked up only then.
                self.driver.invalidate_cache(self.driver._parent(path))
                size = self.driver.info(path).get("size")
                expected = end - start if size is None else max(0, min(end, size) - start)
                if len(data) == size != expected:  # a server that knows no ranges
                    return data[start:end]
                if size is not None and len(data) != expected:
                    raise WrongBytesError(f"{len(data)} bytes came of {start}..{end} of {size}")
            return data

        return repeated(read, f"read {self.server}://{path}", self.server)

    def cat_ranges(
        self, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int], on_error: str = "return"
    ) -> list[bytes | Exception]:
        """Ranges of files, fetched side by side; one that cannot be had, or has another length, is its exception."""
        found = self.driver.cat_ranges(list(paths), list(starts), list(ends), on_error="return")

        def again(number: int) -> bytes | Exception:
            try:
                return self.cat_file(paths[number], starts[number], ends[number])
            except Exception as error:
                return error

        for number, data in enumerate(found):
            if not isinstance(data, bytes) or len(data) != ends[number] - starts[number]:
                found[number] = again(number)
        return list(found)

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite", **named: Any) -> None:
        """Writes a whole file; `mode="create"` raises FileExistsError if other bytes are there.

        The answer to a request that succeeded can be lost, and then the request is made again, be it by the driver's
        HTTP library without a word. So a file that is there is looked at: with the same bytes, it was written here.
        """
        what = f"write {self.server}://{path}"
        try:
            repeated(lambda: self.driver.pipe_file(path, data, mode=mode, **named), what, self.server)
        except Exception as error:
            # A refusal whose text was cut off is known by its number.
            if not isinstance(error, FileExistsError) and (mode != "create" or status_of(error) != 412):
                raise
            if self.cat_file(path) != data:
                raise FileExistsError(path) from error

    def open(self, path: str, mode: str = "rb", cached: bool = True, **named: Any) -> Any:
        """`cached`: its blocks come from this machine's cache, where they are there, and go there."""
        if mode != "rb":
            return self.driver.open(path, mode, **named)
        info = self.info(path)
        if info.get("size") is None:
            return self.driver.open(path, mode, **named)
        return io.BufferedReader(RemoteFile(self, path, info, cached), buffer_size=_BUFFER_BYTES)

    def unstrip_protocol(self, path: str) -> str:
        return str(self.driver.unstrip_protocol(path))


class RemoteFile(io.RawIOBase):
    """A remote file for reading, in blocks that are fetched when they are needed and kept by the machine's cache."""

    def __init__(self, fs: Remote, path: str, info: dict[str, Any], cached: bool) -> None:
        self.fs, self.path, self.size = fs, path, int(info["size"])
        self._at = 0
        self._held: dict[int, bytes] = {}
        self._cache = blocks.of(fs.unstrip_protocol(path), info) if cached else blocks.NONE

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if self._at < 0:
            raise ValueError(f"negative offset {self._at}")
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        number, inside = divmod(self._at, blocks.SIZE)
        if self._at >= self.size or not len(view):
            return 0
        piece = memoryview(self._block(number))[inside : inside + len(view)]
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _block(self, number: int) -> bytes:
        found = self._held.get(number)
        if found is None:
            start, end = number * blocks.SIZE, min((number + 1) * blocks.SIZE, self.size)
            found = self._cache.block(number, end - start, lambda: self._fetched(start, end))
            if len(self._held) >= 2:
                del self._held[next(iter(self._held))]
            self._held[number] = found
        return found

    def _fetched(self, start: int, end: int) -> bytes:
        data = self.fs.cat_file(self.path, start, end)
        if len(data) != end - start:
            raise WrongBytesError(f"{self.path} has changed: {len(data)} bytes came of {start}..{end}")
        return data


def opened(url: str, cached: bool = True) -> IO[bytes]:
    """Any file, local or remote, for reading."""
    fs, path = file_system(url)
    file: IO[bytes] = fs.open(path, "rb", cached=cached) if isinstance(fs, Remote) else fs.open(path, "rb")
    return file


def _prepare(fs: Any, server: str) -> None:
    """Switches a driver's own retries off, and has each request that it makes inside a call repeated by itself."""
    if server != "s3" or not hasattr(fs, "_call_s3"):
        return
    with _preparing:
        if getattr(fs, "_lodeset", False):
            return
        timeout = silence_s()
        fs.config_kwargs = {
            "retries": {"total_max_attempts": 1},
            "read_timeout": timeout,
            "connect_timeout": min(10.0, timeout),
            **fs.config_kwargs,
        }
        fs.retries = 1
        fs._call_s3 = patiently(fs._call_s3, f"a request to {server}", server)
        fs._lodeset = True
