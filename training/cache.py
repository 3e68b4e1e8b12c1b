"""Cache whole shards on a local disk if the store is remote. The cache changes how fast images arrive, never which
ones.

All processes of a machine share the folder: each one copies shards that no other process is copying, and reads missing
shards from the source.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from lodeset.pipeline.remote.file_system import opened

log = logging.getLogger(__name__)

SUFFIX, UNFINISHED = ".shard", ".part"
COPIED_AT_ONCE = 2**22


class ShardCache:
    """Copies of `shards` (URLs; the part that is read ends at `extents`) in `folder`. Other files there are left alone.

    A shard that a take-down rewrites in place ends at another offset afterwards, so an old copy is not mistaken for it.
    """

    def __init__(self, folder: Path, shards: Sequence[str], extents: Sequence[int]) -> None:
        self.folder = folder
        self.shards = shards
        self.extents = extents
        self._wanted: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._copying: threading.Thread | None = None
        self._deciding = threading.Lock()

    def path(self, shard: int) -> Path:
        key = f"{self.shards[shard]} {self.extents[shard]}"
        return self.folder / (hashlib.sha256(key.encode()).hexdigest()[:32] + SUFFIX)

    def read(self, shard: int, start: int, size: int) -> bytes | None:
        """Bytes of a shard, fewer at its end; None if the shard is not cached or cannot be read."""
        try:
            with open(self.path(shard), "rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError:
            return None

    def want(self, now: Iterable[int], soon: Iterable[int]) -> None:
        """Announce the shards that are read from now on: they are copied in the background, those of `soon` last, and
        all others are removed.
        """
        wanted = tuple(now), tuple(soon)
        with self._deciding:
            if wanted == self._wanted:
                return
            self._wanted = wanted
            if self._copying is None:
                self._copying = threading.Thread(target=self._copy, daemon=True, name="shard cache")
                self._copying.start()

    def _copy(self) -> None:
        done = None
        while True:
            with self._deciding:
                wanted = self._wanted
                if wanted is None or wanted == done:
                    self._copying = None
                    return
            try:
                self._bring(wanted)
            except Exception as error:  # object-store clients raise arbitrary errors; readers can use the source
                log.warning("shards are currently not copied to %s: %s: %s", self.folder, type(error).__name__, error)
            done = wanted

    def _bring(self, wanted: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        self._remove_but({*wanted[0], *wanted[1]})
        for shard in (*wanted[0], *wanted[1]):
            if self._wanted != wanted:
                return
            self._fetch(shard)

    def _remove_but(self, wanted: set[int]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        keep = {self.path(shard).name for shard in wanted}
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path.name not in keep:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(f"*{UNFINISHED}"):  # left by a process that was killed or ran out of disk space
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                if _locked(file, path):
                    path.unlink()

    def _fetch(self, shard: int) -> None:
        """Copy a shard unless it is cached or another process is copying it."""
        final = self.path(shard)
        unfinished = final.with_suffix(UNFINISHED)
        if final.exists():
            return
        with open(unfinished, "ab") as sink:
            if not _locked(sink, unfinished) or final.exists():
                return
            sink.truncate(0)  # left by a process that was killed
            with opened(self.shards[shard], cached=False) as source:
                shutil.copyfileobj(source, sink, COPIED_AT_ONCE)
            sink.flush()
            os.replace(unfinished, final)


def _locked(file: BinaryIO, path: Path) -> bool:
    """Whether only this process has `path` open for writing; False if another process just finished and renamed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
