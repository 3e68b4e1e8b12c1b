"""A folder of this machine that holds copies of remote bytes, bounded in size and shared by all its processes.

What was used least recently goes first. Everything in it can be fetched again, so a full or missing disk costs time and
nothing else; only a folder that a library must open by its path has to be there while it is used, and that is locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

FOLDER, SIZE_GB = "LODESET_CACHE_DIR", "LODESET_CACHE_GB"
DEFAULT_GB = 10.0
_LOCK, _PART = ".lock", ".part"
# How much of the limit may be written before the folder is measured again, and how much is left free then.
_SHARE, _FREED = 1 / 50, 1 / 10
# A piece that has been unfinished for so long belongs to a process that died.
_ABANDONED_S = 3_600.0


@dataclass
class Cache:
    """Entries are files, or folders beside a lock, by the digest of what they are."""

    folder: Path
    limit_bytes: int
    _written: int = field(default=1 << 62)  # since this process last measured: it never has

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def keep(self, path: Path, data: bytes) -> None:
        """Puts one file there, if it can."""
        if len(data) > self.limit_bytes:
            return
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{_PART}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.make_room(len(data))
            part.write_bytes(data)
            os.replace(part, path)
        except OSError:  # the disk is full: what is cached stays what it was
            with contextlib.suppress(OSError):
                part.unlink()

    @contextlib.contextmanager
    def entry(self, key: str, size: int, fill: Callable[[Path], None]) -> Iterator[Path]:
        """A folder that `fill` fills, once a machine; it stays while the block runs, in this process and in others."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}{_LOCK}", "a+b") as lock:
            while True:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if path.is_dir():
                    break
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_dir():
                    self.make_room(size)
                    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{_PART}")
                    try:
                        part.mkdir()
                        fill(part)
                        os.rename(part, path)
                    finally:
                        shutil.rmtree(part, ignore_errors=True)
            os.utime(path)
            yield path

    def make_room(self, size: int) -> None:
        """Removes what was used least recently, where the limit would be passed. One process does so at a time."""
        self._written += size
        if self._written < self.limit_bytes * _SHARE:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / _LOCK, "a+b") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            self._written = size
            entries = sorted(self._entries())
            held = sum(one_size for _, one_size, _ in entries)
            if held + size <= self.limit_bytes:
                return
            for _, one_size, path in entries:
                if held + size <= self.limit_bytes * (1 - _FREED):
                    break
                if _removed(path):
                    held -= one_size

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """When each entry was last used, its size and its path; what a process left unfinished is removed."""
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.name.endswith(_PART):
                    if time.time() - status.st_mtime > _ABANDONED_S:
                        shutil.rmtree(path) if stat.S_ISDIR(status.st_mode) else path.unlink()
                elif stat.S_ISDIR(status.st_mode):
                    yield status.st_mtime, sum(file.stat().st_size for file in path.iterdir()), path
                elif not path.name.endswith(_LOCK):
                    yield status.st_mtime, status.st_size, path


def _removed(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if not path.is_dir():
            path.unlink()
            return True
        with open(f"{path}{_LOCK}", "a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not while somebody reads it
            shutil.rmtree(path)
            return True
    return False


def machine_cache() -> Cache | None:
    """The cache of this machine; None where `resources.cache_gb` is 0, or its folder cannot be used."""
    limit = float(os.environ.get(SIZE_GB, DEFAULT_GB))
    return None if limit <= 0 else _cache(os.environ.get(FOLDER, ""), int(limit * 2**30))


def copies() -> Cache:
    """The cache, for folders that a library opens by path: without a limit where there is none for blocks."""
    unlimited = 1 << 62
    return machine_cache() or _cache(os.environ.get(FOLDER, ""), unlimited) or Cache(_own(), unlimited)


@functools.cache
def _cache(folder: str, limit_bytes: int) -> Cache | None:
    chosen = Path(folder) if folder else Path(tempfile.gettempdir(), f"lodeset-cache-{os.getuid()}")
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = chosen.lstat()
        # Everybody can make a folder among temporary files, with this name and anything in it.
        if not folder and (not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid()):
            return None
    except OSError:
        return None
    return Cache(chosen, limit_bytes)


@functools.cache
def _own() -> Path:
    return Path(tempfile.mkdtemp(prefix="lodeset-cache-"))


def scratch(name: str) -> Path:
    """A new folder for what one process works on, beside the cache."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=copies().folder))
