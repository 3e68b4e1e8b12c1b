"""File systems as they are: drivers that are not installed, servers that do not answer, mounts without hard links."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
import traceback
from collections.abc import Iterator
from typing import IO, Any

from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote.file_system import file_system
from lodeset.pipeline.shown import shown

# Packages that drivers of remote file systems are made of: what they raise is about the file system.
_DRIVERS: tuple[str, ...] = (
    "adlfs",
    "aiobotocore",
    "aiohttp",
    "azure",
    "boto3",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "httpx",
)
_DRIVERS += ("huggingface_hub", "ocifs", "ossfs", "paramiko", "requests", "s3fs", "smbprotocol", "urllib3", "webdav4")
# What mounts say that know no hard links, or no more of them: SMB, FAT, FUSE, 9p, Android.
_NO_LINKS = (
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
    errno.EXDEV,
    errno.EINVAL,
)
# What a disk or a mount says that is failing.
_BROKEN = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN)
ABANDONED_S = 10.0  # a name that is reserved for so long belongs to a process that died


@contextlib.contextmanager
def reaching(what: str, instead: str = "use a path") -> Iterator[None]:
    """Turns what a driver raises, or that there is none, into a sentence about `what`; `instead` is the way out.

    What the local file system says (FileNotFoundError and its like) passes: whoever asked knows better what it means.
    """
    try:
        yield
    except ImportError as error:
        driver = "(pip install s3fs, gcsfs or adlfs, beside lodeset)"
        raise LodesetError(f"{what} cannot be opened: {shown(error)} {driver}, or {instead}") from error
    except LodesetError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise LodesetError(f"{what} cannot be opened: {shown(error)}; {instead}") from error
        if is_of_a_driver(error) or (not isinstance(error, OSError) and _raised_by_a_driver(error)):
            raise LodesetError(unreachable(what, error)) from error
        raise


def opened_file_system(url: str, what: str, instead: str) -> tuple[Any, str]:
    """The file system that `url` names, and the path on it; nothing is read yet.

    Raises:
        LodesetError: the protocol is unknown, or what speaks it is not installed; `what` says whose URL it is, `instead` the way out.
    """
    with reaching(f"{what} {shown(url)}", instead):
        try:
            fs, path = file_system(url)
        except OSError as error:  # a driver that connects at once
            raise LodesetError(unreachable(f"{what} {shown(url)}", error)) from error
    return fs, path


def why_not_there(fs: Any, path: str, what: str) -> str | None:
    """What hides behind a remote file system's `exists() == False`, where that is no mere absence: nobody answered."""
    try:
        fs.info(path)
    except Exception as error:
        behind = error.__cause__ or error.__context__ or error
        if is_of_a_driver(behind) and getattr(behind, "status", None) != 404:
            return unreachable(what, behind)
    return None


def explanation(error: Exception, action: str, url: str, root: str, local: bool) -> str | None:
    """A sentence about what the file system of a store said; None where the error is about something else."""
    store = f"the store {shown(url)}"
    if not isinstance(error, OSError):
        return unreachable(store, error) if is_of_a_driver(error) else None
    named = error.filename if isinstance(error.filename, str) else root
    what = store if named.startswith(root) else shown(named)
    why = error.strerror or shown(" ".join(str(error).split())[:200]) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what} is full ({action}): free some space and run again, nothing finished is lost"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{what} cannot be read or written ({action}: {why}): check `store:` and its permissions"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{what} is not a folder ({action}: {why}): choose another `store:`"
    if error.errno in _BROKEN:
        return f"{what} is failing ({action}: {why}): check the disk or the mount, then run again"
    if error.errno == errno.ENAMETOOLONG:
        return f"{what} cannot hold a path that long ({action}): choose a shorter `store:`"
    driver = not local and (error.errno is None or is_of_a_driver(error))
    return unreachable(what, error) if driver and not isinstance(error, FileNotFoundError | FileExistsError) else None


def is_of_a_driver(error: BaseException) -> bool:
    """Whether a remote file system's driver raised this: no credentials, no such host, a refusal."""
    return any(kind.__module__.partition(".")[0] in _DRIVERS for kind in type(error).__mro__)


def _raised_by_a_driver(error: BaseException) -> bool:
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.partition(".")[0] in _DRIVERS for name in frames)


def unreachable(what: str, error: BaseException) -> str:
    """What a driver's error means for whoever configured it."""
    said = shown(" ".join(str(error).split())[:300]) or "no message"
    name = type(error).__name__
    about = f"{name} {said}".lower()
    if isinstance(error, PermissionError) or any(word in about for word in _CREDENTIALS):
        way = "give credentials that may use it (the driver takes them from its usual environment variables and files)"
    elif any(word in about for word in ("endpoint", "connect", "resolve", "name or service", "timeout", "timed out")):
        way = "check the network, the address and the endpoint (e.g. AWS_ENDPOINT_URL)"
    else:
        way = "check the URL and what its driver needs"
    return f"{what} cannot be reached ({name}: {said}): {way}, then run again"


_CREDENTIALS = (
    "credential",
    "accessdenied",
    "access denied",
    "forbidden",
    "unauthorized",
    "401",
    "403",
    "token",
    "login",
)


def published(temporary: str, path: str) -> bool:
    """Gives a finished file its name, unless that is taken: then False. The other name may stay.

    link(2) is an exclusive create of a file that is complete already. Where there are no hard links, the name is reserved by
    an exclusive create beside it, and the file renamed: a reader never meets half a file either way.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _renamed(temporary, path)
    return True


def _renamed(temporary: str, path: str) -> bool:
    reserved = f"{path}.reserved"
    waited_since = time.monotonic()
    while True:
        if os.path.lexists(path):
            return False
        try:
            os.close(os.open(reserved, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            break
        except FileExistsError:
            # Somebody else renames right now. Only one who was killed between two calls takes longer than a moment.
            if time.monotonic() - waited_since > ABANDONED_S:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(reserved)
                waited_since = time.monotonic()
            time.sleep(0.02)
    try:
        if os.path.lexists(path):
            return False
        os.rename(temporary, path)
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(reserved)


class HashingFile:
    """A binary sink that keeps the SHA-256 and size of what passes; enough of a file for pyarrow and tarfile."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._sink.write(view)
        self._hash.update(view)
        self.size_bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.size_bytes

    def flush(self) -> None:
        self._sink.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """The store closes the file underneath once it is complete."""

    def wrote_the_bytes_of(self, path: str) -> bool:
        """Whether a file that was there before holds the same."""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest() == self._hash.digest()

    def sha256(self) -> str:
        return self._hash.hexdigest()
