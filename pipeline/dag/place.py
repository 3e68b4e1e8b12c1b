"""A folder on any fsspec file system: whole files, put once."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from fsspec.implementations.local import LocalFileSystem

from lodeset.pipeline import own
from lodeset.pipeline.dag.files import HashingFile, explanation, opened_file_system, published, unreachable
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote.retries import WrongBytesError, repeated
from lodeset.pipeline.shown import shown

# Smaller files are sent from memory, as one request.
_WHOLE_BYTES = 64 * 2**20


class Place:
    """A URL, and what is read and written below it."""

    def __init__(self, url: str) -> None:
        """Raises LodesetError where the URL's protocol is unknown or its driver is not installed."""
        self.url = url
        self.fs, self.root = opened_file_system(url, "the store", "choose another `store:`")
        self.local = isinstance(self.fs, LocalFileSystem)
        # Object stores begin their paths with a bucket; lodeset never makes one, and objects need no folders.
        self._in_bucket = not self.local and not self.root.startswith("/")

    def path(self, relative: str) -> str:
        return f"{self.root}/{relative}"

    def full_url(self, relative: str) -> str:
        return cast(str, self.fs.unstrip_protocol(self.path(relative))) if not self.local else self.path(relative)

    @contextlib.contextmanager
    def explained(self, action: str) -> Iterator[None]:
        """Turns what a file system says into what a user can act on."""
        try:
            yield
        except Exception as error:
            told = explanation(error, action, self.url, self.root, self.local)
            if told is None:
                raise
            raise LodesetError(told) from error

    @contextlib.contextmanager
    def _talking(self, action: str) -> Iterator[None]:
        """Likewise around one call of a remote file system, where whatever is raised comes from its driver."""
        try:
            with self.explained(action):
                yield
        except (LodesetError, FileNotFoundError, FileExistsError, NotADirectoryError):
            raise
        except Exception as error:
            if self.local:
                raise
            raise LodesetError(unreachable(f"the store {shown(self.url)}", error)) from error

    def prepare(self) -> None:
        """Makes the store's folder and proves that it can be written, before any work is spent. Never makes a bucket."""
        probe = self.path(f".probe-{uuid.uuid4().hex}")
        try:
            with self._talking("first write"):
                self._make_folder(self.root)
                self.fs.pipe_file(probe, b"")
                self.fs.rm_file(probe)
        except FileNotFoundError as error:
            if not self._in_bucket:
                raise LodesetError(
                    f"the store {shown(self.url)} cannot be made ({error.strerror or 'not found'}): choose another `store:`"
                ) from error
            bucket = self.root.partition("/")[0]
            raise LodesetError(
                f"the store {shown(self.url)} is not there: nothing called `{shown(bucket)}` was found ({type(error).__name__}). "
                "lodeset makes no buckets: correct `store:`, or create it first"
            ) from error
        if self.read(own.MARK) is None:
            self.put_absent(own.MARK, own.text(own.store_kind(self.names(""))))

    def _make_folder(self, path: str) -> None:
        if not self._in_bucket:
            self.fs.makedirs(path, exist_ok=True)

    def put_absent(self, relative: str, data: bytes) -> bool:
        """Writes a whole file, visible only when complete; False if it was there already.

        Atomic on a local file system, and where fsspec's driver has a conditional put (s3fs, gcsfs, adlfs). Elsewhere it is
        a look followed by a write, and two runs that the claims did not keep apart may both believe they were first.
        """
        path = self.path(relative)
        with self._talking(f"writing {relative}"):
            self._make_folder(path.rsplit("/", 1)[0])
            if not self.local:
                try:
                    self.fs.pipe_file(path, data, mode="create")
                except FileExistsError:
                    return False
                return True
            temporary = f"{path}.{uuid.uuid4().hex}"
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                return published(temporary, path)
            except FileNotFoundError as error:
                if error.filename != temporary:
                    raise
                raise LodesetError(self._vanished(relative)) from error
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)

    def _vanished(self, relative: str) -> str:
        return (
            f"the store {shown(self.url)} was moved, unmounted or cleaned up while {relative} was written: see that it is there again, "
            "then run again; nothing finished is lost"
        )

    def read(self, relative: str) -> bytes | None:
        """A file's bytes, None where there is none."""
        try:
            with self._talking(f"reading {relative}"):
                return cast(bytes, self.fs.cat_file(self.path(relative)))
        except FileNotFoundError:
            return None

    def replace(self, copy: str, relative: str) -> None:
        """Puts a file in the place of another one; nothing where that was done before. For take-downs alone: everything else in
        a store is written once."""
        with self.explained(f"replacing {relative}"), contextlib.suppress(FileNotFoundError):
            if self.local:
                os.replace(self.path(copy), self.path(relative))
            else:
                self.fs.mv(self.path(copy), self.path(relative))

    def overwrite(self, relative: str, data: bytes) -> None:
        """Writes a whole file again and again: news, which nobody needs to survive a power cut. A reader meets the old or the
        new one."""
        path = self.path(relative)
        with self._talking(f"writing {relative}"):
            self._make_folder(path.rsplit("/", 1)[0])
            if not self.local:
                self.fs.pipe_file(path, data)
                return
            temporary = f"{path}.{uuid.uuid4().hex}"
            try:
                Path(temporary).write_bytes(data)
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)

    def append(self, relative: str, data: bytes) -> None:
        """Adds to a file that one process alone writes: a log. Object stores cannot append, so the whole file is written."""
        with self.explained(f"writing {relative}"):
            self._make_folder(self.path(relative).rsplit("/", 1)[0])
            self.fs.pipe_file(self.path(relative), (self.read(relative) or b"") + data)

    def delete(self, relative: str) -> None:
        with self._talking(f"deleting {relative}"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(relative))

    def names(self, relative: str) -> list[str]:
        """The names directly under a folder, sorted; empty where there is none."""
        try:
            with self._talking(f"reading {relative}"):
                listed = self.fs.ls(self.path(relative), detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in listed)

    @contextlib.contextmanager
    def writing(self, relative: str) -> Iterator[HashingFile]:
        """A file that is hashed while it is written and appears under its name only when complete.

        Where that name is taken already (an attempt that was killed before it committed), the file that was there stays if it has
        the same bytes. Such names stand for what is in the file, so one with other bytes is damaged, and gives way.
        """
        if not self.local:
            with self._uploading(relative) as sink:
                yield sink
            return
        path = self.path(relative)
        with self.explained(f"writing {relative}"):
            self._make_folder(path.rsplit("/", 1)[0])
            temporary = f"{path}.{uuid.uuid4().hex}"
            try:
                with open(temporary, "xb") as raw:
                    sink = HashingFile(raw)
                    yield sink
                    sink.flush()
                    os.fsync(raw.fileno())
                if not published(temporary, path) and not sink.wrote_the_bytes_of(path):
                    os.replace(temporary, path)
            except FileNotFoundError as error:
                if error.filename != temporary:
                    raise
                raise LodesetError(self._vanished(relative)) from error
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    @contextlib.contextmanager
    def _uploading(self, relative: str) -> Iterator[HashingFile]:
        """A remote file is written on this machine first, so that sending it can be repeated."""
        with tempfile.TemporaryDirectory(prefix="lodeset-upload-") as folder:
            written = Path(folder, "file")
            with self.explained(f"writing {relative}"), written.open("xb") as raw:
                sink = HashingFile(cast(IO[bytes], raw))
                yield sink
            self.upload(written, relative)

    def upload(self, file: Path, relative: str) -> None:
        """Puts a file of this machine into a remote place, in place of one that is there, and checks its size.

        Raises:
            LodesetError: the place cannot be reached, or does not keep what it is sent.
        """
        path, size = self.path(relative), file.stat().st_size

        def send() -> None:
            if size <= _WHOLE_BYTES:
                self.fs.pipe_file(path, file.read_bytes())
            else:
                self.fs.put_file(str(file), path)
            self.fs.invalidate_cache(path)
            found = self.fs.info(path).get("size")
            if found is not None and found != size:
                raise WrongBytesError(f"{found:,} bytes of {relative} arrived, and {size:,} were sent")

        with self._talking(f"writing {relative}"):
            self._make_folder(path.rsplit("/", 1)[0])
            repeated(send, f"write {shown(self.url)}/{relative}", self.fs.server)

    def delete_folder(self, relative: str) -> None:
        """Everything below a folder; nothing where there is none."""
        with self._talking(f"deleting {relative}"), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(relative), recursive=True)
