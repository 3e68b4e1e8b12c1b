"""The folder of a run in a remote store: an object store has no paths that workers could share.

Every worker trains in a folder of its own machine and sends what counts to the store: its part of each checkpoint,
then, from one worker, the marker that makes it complete (put only if there is none); the metrics while it runs; and the
model at the end. A run that continues fetches the newest complete checkpoint, on every machine that has a worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import posixpath
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lodeset.pipeline.dag.background import repeating
from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote.cache import copies
from lodeset.training.checkpoint import MARKER, NAME, Marker, StoredFile, described, same_run

# What a run left at its end, with sizes and digests; written last.
FILES = "files.json"
_METRICS_EVERY_S = 5.0
_LOCK = ".lock"
_LISTED = TypeAdapter(dict[str, StoredFile])


@dataclass(frozen=True)
class Away:
    """A folder below a remote store; picklable."""

    url: str  # of the store
    folder: str  # relative to it
    store: Store = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", Store(self.url))

    def __str__(self) -> str:
        return self.store.full_url(self.folder)

    def name(self, relative: str) -> str:
        return f"{self.folder}/{relative}"

    # -- checkpoints

    def newest(self, identity: Mapping[str, Any], into: Path) -> tuple[int, Path] | None:
        """As `newest_checkpoint`; it is fetched."""
        for step in reversed(self.steps()):
            marker = self._marker(step)
            if marker is None:
                continue
            path = f"{self}/{_step(step)}"
            same_run(str(self), path, marker.identity, identity)
            with contextlib.suppress(FileNotFoundError, ValueError):  # damaged: an earlier one
                return step, self.fetch(step, into)
        return None

    def steps(self) -> list[int]:
        """The steps of the checkpoints there, complete or not."""
        matches = (NAME.fullmatch(name) for name in self.store.names(self.folder))
        return sorted(int(match[1]) for match in matches if match)

    def newest_step(self) -> int:
        """The step of the newest complete checkpoint; 0 if there is none."""
        return next((step for step in reversed(self.steps()) if self._marker(step) is not None), 0)

    def _marker(self, step: int) -> Marker | None:
        data = self.store.read(self.name(f"{_step(step)}/{MARKER}"))
        try:
            return None if data is None else Marker.model_validate_json(data)
        except ValidationError:
            return None

    def fetch(self, step: int, into: Path) -> Path:
        """Completes a checkpoint's folder on this machine: files that are there already were checked.

        Raises:
            FileNotFoundError, ValueError: a file is missing or damaged.
        """
        marker, folder = self._marker(step), into / _step(step)
        if marker is None:
            raise FileNotFoundError(f"{self}/{_step(step)}")
        folder.mkdir(parents=True, exist_ok=True)
        with open(into / f"{folder.name}{_LOCK}", "a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of the workers of a machine, one
            for name, stored in marker.files.items():
                if not (folder / name).exists():
                    part = folder / f".{name}.part"
                    self.store.fetch_whole(self._file(step, name, stored), part)
                    part.rename(folder / name)
        return folder

    def _file(self, step: int, name: str, stored: StoredFile) -> File:
        return File(self.name(f"{_step(step)}/{name}"), 0, stored.size_bytes, stored.sha256)

    def send(self, step: int, folder: Path) -> dict[str, StoredFile]:
        """One worker's files of a checkpoint."""
        files = described(folder)
        for name in files:
            self.store.upload(folder / name, self.name(f"{_step(step)}/{name}"))
        return files

    def withdraw(self, step: int) -> None:
        """Removes the checkpoints of this step or later: a run that comes to it again found them damaged."""
        for other in self.steps():
            if other >= step:
                self._remove(other)

    def commit(self, marker: Marker, keep: int) -> None:
        """Makes a checkpoint complete once all its files are there, and removes all but the newest `keep`.

        Raises:
            LodesetError: another run committed this step in between.
        """
        path = self.name(f"{_step(marker.step)}/{MARKER}")
        if not self.store.put_absent(path, marker.model_dump_json(indent=2).encode()):
            raise LodesetError(
                f"{self.store.full_url(path)} was written by another run while this one trained into the same folder: stop "
                "one of them, and run again to continue from the newest checkpoint"
            )
        for older in self.steps()[:-keep]:
            self._remove(older)

    def _remove(self, step: int) -> None:
        """The marker first: without it, the files are no checkpoint."""
        self.store.delete(self.name(f"{_step(step)}/{MARKER}"))
        self.store.delete_folder(self.name(_step(step)))

    # -- what a run tells, and leaves

    def bring(self, name: str, into: Path) -> None:
        """A file that the run wrote before, if it did."""
        data = self.store.read(self.name(name))
        if data is not None:
            (into / name).write_bytes(data)

    def keep(self, file: Path, relative: str) -> None:
        """A file of this machine; in place of one that is there."""
        self.store.upload(file, self.name(relative))

    @contextlib.contextmanager
    def telling(self, file: Path) -> Iterator[None]:
        """Sends a file again and again while the block runs, if it changed: the metrics, by which others see how far it is."""
        sent = b""

        def look() -> float:
            nonlocal sent
            with contextlib.suppress(OSError, LodesetError):  # only news: the file is sent once more at the end
                data = file.read_bytes()
                if data != sent:
                    self.store.overwrite(self.name(file.name), data)
                    sent = data
            return _METRICS_EVERY_S

        with repeating(look, _METRICS_EVERY_S):
            yield

    def leave(self, folder: Path, names: list[str]) -> None:
        """Sends what the run was for, and then the list of it."""
        files = {name: stored for name, stored in described(folder).items() if name in names}
        for name in files:
            self.keep(folder / name, name)
        self.store.overwrite(self.name(FILES), _LISTED.dump_json(files, indent=1))

    def left(self) -> dict[str, File]:
        """What `leave` sent, by name.

        Raises:
            LodesetError: the run has not ended.
        """
        data = self.store.read(self.name(FILES))
        if data is None:
            raise LodesetError(f"{self}/{FILES} is not there: the run did not end; run again to continue it")
        listed = _LISTED.validate_json(data)
        return {name: File(self.name(name), 0, one.size_bytes, one.sha256) for name, one in listed.items()}

    def remove(self) -> None:
        self.store.delete_folder(self.folder)


RunFolder = Path | Away


def _step(step: int) -> str:
    return f"step-{step:07d}"


@contextlib.contextmanager
def workplace(attempt: str) -> Iterator[Path]:
    """The folder on this machine that the workers of one attempt share, and that the last of them removes."""
    root = copies().folder
    for other in root.glob(f"training-*{_LOCK}"):  # of attempts that were killed
        _removed(other)
    lock_path = root / f"training-{attempt}{_LOCK}"
    folder = lock_path.with_suffix("")
    with open(lock_path, "a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
            _removed(lock_path)


def _removed(lock_path: Path) -> None:
    with contextlib.suppress(OSError), open(lock_path, "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
        lock_path.unlink()


def read(place: RunFolder, name: str) -> bytes | None:
    """A small file of a run's folder, wherever that is."""
    if isinstance(place, Away):
        return place.store.read(place.name(name))
    path = place / name
    return path.read_bytes() if path.is_file() else None


def relative(place: RunFolder, store: Store) -> str:
    """A run's folder, relative to the store that it is in."""
    return place.folder if isinstance(place, Away) else posixpath.relpath(str(place), store.root)
