"""Folders of committed files that libraries open by their paths: models and checkpoints."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

from lodeset.pipeline.config import Strict
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.remote.cache import copies


class Stored(Strict):
    """A folder on a file system that every worker mounts, or files of a remote store that each machine copies."""

    folder: str  # a path, or a URL
    store: str | None = None
    files: tuple[File, ...] = ()

    @contextlib.contextmanager
    def here(self) -> Iterator[Path]:
        """The folder on this machine. A copy stays in the machine's cache, and cannot leave it while the block runs.

        Raises:
            DamagedError: a file is missing, or its bytes are not those that were written.
        """
        if self.store is None:
            yield Path(self.folder)
            return
        store, names = Store(self.store), [posixpath.basename(file.path) for file in self.files]

        def fill(folder: Path) -> None:
            for file, name in zip(self.files, names, strict=True):
                store.fetch(file, folder / name)

        key = digest([[name, file.sha256] for name, file in zip(names, self.files, strict=True)])
        with copies().entry(key, sum(file.size_bytes for file in self.files), fill) as folder:
            yield folder


def stored(store: Store, files: Sequence[File]) -> Stored:
    """The folder of these files, which lie side by side. Nothing is copied here, and never from a local store."""
    (folder,) = {posixpath.dirname(file.path) for file in files}
    if store.local:
        return Stored(folder=store.path(folder))
    return Stored(folder=store.full_url(folder), store=store.url, files=tuple(files))
