"""Where results lie: parts and artifacts on any fsspec file system.

```
<store>/parts/<stage>/<key>/<attempt>-<table>.parquet    data, under names that no other attempt uses
<store>/parts/<stage>/<key>/manifest.json                put only if absent: the part is finished
<store>/artifacts/<stage>/<set>/<fingerprint>/manifest.json    likewise: the stage is finished
<store>/lists/<sha256>.json                              pieces of long lists, which manifests share (`pipeline/dag/lists.py`)
<store>/attempts/<number>.json                           what a run says while it works (`pipeline/dag/attempts.py`)
<store>/runs/<number>.json                               what a run made of it all (`pipeline/dag/runs.py`)
<store>/audits/<run>-<digest>.json                       what people judged of a run (`infra/audits.py`)
<store>/claims/...                                       leases; they only save double work
<store>/damaged/...                                      what a reader found damaged; `run` makes it again (`pipeline/dag/damage.py`)
```

A reader follows manifests, so files of an attempt that died are never seen. Nothing is renamed. A file's bytes are compared with
the digest in its manifest when a process first reads it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from lodeset.pipeline.dag.files import HashingFile
from lodeset.pipeline.dag.manifests import PART, RUN, parsed, parsed_artifact, pieces_of, sealed, unsealed
from lodeset.pipeline.dag.manifests import Artifact as Artifact
from lodeset.pipeline.dag.manifests import File as File
from lodeset.pipeline.dag.manifests import Part as Part
from lodeset.pipeline.dag.manifests import Rows as Rows
from lodeset.pipeline.dag.manifests import Run as Run
from lodeset.pipeline.dag.place import Place
from lodeset.pipeline.errors import DamagedError, LodesetError
from lodeset.pipeline.remote.retries import note_wrong
from lodeset.pipeline.shown import shown

Told = TypeVar("Told")
Read = TypeVar("Read")

DAMAGED, RUNS, LISTS = "damaged", "runs", "lists"
# (full path, digest) of files that this process has read and found whole -> size and modification time then, where that is cheap to
# ask for.
_WHOLE: dict[tuple[str, str], tuple[int, int] | None] = {}
_BLOCK_BYTES = 4 * 2**20
ROW_GROUP = 16_384  # rows
_LOOKS = 8  # at a remote file whose bytes are another time other ones


class Store(Place):
    """Parts, artifacts and runs under one URL. Picklable: workers open their own connection."""

    def __init__(self, url: str) -> None:
        """Raises LodesetError where the URL's protocol is unknown or its driver is not installed."""
        super().__init__(url)
        self._runs: dict[int, Run] = {}  # records are written once
        self._pieces: dict[str, bytes] = {}  # likewise
        self._used: dict[str, set[str]] = {}  # parts that were found or made through this object, by their stage

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    # -- sealed files

    def read_json(self, relative: str) -> dict[str, Any] | None:
        """What a sealed file says, None where there is none.

        Raises:
            DamagedError: it is not what was written.
        """
        return self._manifest_at(relative, unsealed)

    def _manifest_at(self, relative: str, parse: Callable[[bytes], Told]) -> Told | None:
        try:
            return self._agreed(lambda: self.read(relative), lambda data: None if data is None else parse(data))
        except ValueError as error:
            raise self.damaged(relative, str(error)) from error

    def _agreed(self, read: Callable[[], Read], accept: Callable[[Read], Told]) -> Told:
        """What `accept` makes of what is read. A remote file system may answer wrong once: what it gives twice is what is there."""
        found = read()
        for looks_left in reversed(range(1 if self.local else _LOOKS)):
            try:
                return accept(found)
            except ValueError as error:
                before = found
                if not looks_left or (found := read()) == before:
                    raise
                note_wrong(f"read {shown(self.url)}", error)
        raise AssertionError("the last look returns or raises")

    def replace_json(self, relative: str, tree: Mapping[str, Any]) -> None:
        """Likewise, a manifest."""
        copy = f"{relative}.{uuid.uuid4().hex}"
        self.put_absent(copy, sealed(tree))
        self.replace(copy, relative)

    def write_named(self, relative: str, data: pa.Table, row_group: int = ROW_GROUP) -> File:
        """One Parquet file."""
        with self.writing(relative) as sink:
            pq.write_table(data, sink, compression="zstd", row_group_size=row_group)
        return File(relative, data.num_rows, sink.size_bytes, sink.sha256())

    # -- parts

    def part(self, stage: str, key: str) -> Part | None:
        found = self._manifest_at(part_manifest(stage, key), functools.partial(parsed, PART))
        if found is not None:
            self._used.setdefault(stage, set()).add(key)
        return found

    def used(self) -> dict[str, tuple[str, ...]]:
        """The parts that were found or made through this object, by their stage; of a stage's process, which looks all its parts
        up, these are the ones that the stage is made from."""
        return {stage: tuple(sorted(keys)) for stage, keys in sorted(self._used.items())}

    def committed(self, stage: str, keys: Sequence[str]) -> dict[str, Part]:
        """Which of these parts are finished."""
        known = set(self.names(f"parts/{stage}"))
        found = ((key, self.part(stage, key)) for key in keys if key in known)
        return {key: part for key, part in found if part is not None}

    def commit_part(
        self,
        stage: str,
        key: str,
        tables: Mapping[str, pa.Table],
        counts: Mapping[str, int] | None = None,
        seconds: float = 0.0,
        files: Mapping[str, File] | None = None,
    ) -> Part:
        """Writes the tables under names of this attempt alone, then the manifest if there is none: the first attempt wins.

        `files` were written by the caller (shards, checkpoints) and are listed beside the tables.
        """
        folder, attempt = f"parts/{stage}/{key}", uuid.uuid4().hex[:12]
        written = {name: self.write_named(f"{folder}/{attempt}-{name}.parquet", data) for name, data in tables.items()}
        part = Part(key, {**written, **(files or {})}, dict(counts or {}), seconds, time.time(), code_version())
        self._used.setdefault(stage, set()).add(key)
        if self.put_absent(f"{folder}/manifest.json", sealed(asdict(part))):
            return part
        earlier = self.part(stage, key)
        assert earlier is not None, f"{folder}/manifest.json exists and cannot be read"
        # Shards and models have names that are not of one attempt alone: the winner's stay.
        theirs = {file.path for file in earlier.files.values()}
        for file in part.files.values():
            if file.path not in theirs:
                self.delete(file.path)
        return earlier

    def delete_part(self, stage: str, part: Part) -> None:
        """The manifest first: without it, the files are nobody's."""
        self.delete(f"parts/{stage}/{part.key}/manifest.json")
        for file in part.files.values():
            self.delete(file.path)

    # -- artifacts

    def artifact(self, stage: str, set_: str, fingerprint: str) -> Artifact | None:
        return self._manifest_at(artifact_manifest(stage, set_, fingerprint), self.parsed_artifact)

    def parsed_artifact(self, data: bytes) -> Artifact:
        """Raises ValueError: it is not what was written, or a piece of its lists is not."""
        return parsed_artifact(data, self._piece)

    def pieces(self, artifact: Artifact) -> set[str]:
        """The paths of the pieces that an artifact's lists consist of."""
        data = self.read(self.relative_manifest(artifact))
        return set() if data is None else {piece_path(digest) for digest in pieces_of(data, self._piece)}

    def _piece(self, digest: str) -> bytes:
        if digest not in self._pieces:
            data = self.read(piece_path(digest))
            if data is None:
                raise ValueError(f"a piece of its lists, {piece_path(digest)}, is missing")
            self._pieces[digest] = data
        return self._pieces[digest]

    def _put_piece(self, digest: str, data: bytes) -> None:
        """A damaged piece gives way to what its name says."""
        if not self.put_absent(piece_path(digest), data) and self.read(piece_path(digest)) != data:
            self.overwrite(piece_path(digest), data)

    def history(self, stage: str, set_: str) -> list[Artifact]:
        """Every finished artifact of a stage and set, newest first: as the last run used them, whatever clocks said."""
        folder = f"artifacts/{stage}/{set_}"
        found = [self.artifact(stage, set_, fingerprint) for fingerprint in self.names(folder)]
        there = [one for one in found if one is not None]
        used = self.last_used(f"{stage}/{set_}") if len(there) > 1 else {}

        def age(one: Artifact) -> tuple[int, float, str]:
            return -max(one.order, used.get(one.fingerprint, 0)), -one.created, one.fingerprint

        return sorted(there, key=age)

    def next_order(self, stage: str, set_: str) -> int:
        """Larger than that of all artifacts of a stage and set."""
        used = self.last_used(f"{stage}/{set_}")
        return 1 + max([*(one.order for one in self.history(stage, set_)), *used.values()], default=0)

    def last_used(self, id_: str) -> dict[str, int]:
        """Where runs put the artifacts of a stage and set that they used, by fingerprint."""
        found: dict[str, int] = {}
        for number in self.run_numbers():
            made = self.run(number).stages.get(id_)
            if made is not None:
                found[made.fingerprint] = max(made.order, found.get(made.fingerprint, 0))
        return found

    def commit_artifact(self, artifact: Artifact) -> Artifact:
        """Puts the manifest if there is none; whoever came first is returned."""
        if self.put_absent(self.relative_manifest(artifact), sealed(artifact.to_json(self._put_piece))):
            return artifact
        earlier = self.artifact(artifact.stage, artifact.set, artifact.fingerprint)
        assert earlier is not None, f"{self.relative_manifest(artifact)} exists and cannot be read"
        return earlier

    def replace_artifact(self, artifact: Artifact) -> None:
        """Puts it in the place of that with its fingerprint."""
        self.replace_json(self.relative_manifest(artifact), artifact.to_json(self._put_piece))

    def delete_artifact(self, artifact: Artifact) -> None:
        """Its manifest; the parts that it lists may be another's, too."""
        self.delete(self.relative_manifest(artifact))

    def manifest_path(self, artifact: Artifact) -> str:
        return self.full_url(self.relative_manifest(artifact))

    def relative_manifest(self, artifact: Artifact) -> str:
        return artifact_manifest(artifact.stage, artifact.set, artifact.fingerprint)

    # -- runs

    def run_numbers(self) -> list[int]:
        """The numbers of the runs that finished, in their order."""
        names = (name.removesuffix(".json") for name in self.names(RUNS))
        return sorted(int(name) for name in names if name.isdecimal())

    def run(self, number: int) -> Run:
        """Raises LodesetError: there is no such run, or its record is damaged."""
        if number not in self._runs:
            found = self._manifest_at(run_path(number), functools.partial(parsed, RUN))
            if found is None:
                raise LodesetError(f"{self.url} has no run {number}: it has {self._runs_there()}")
            self._runs[number] = found
        return self._runs[number]

    def _runs_there(self) -> str:
        numbers = self.run_numbers()
        if len(numbers) > 1:
            return f"runs {numbers[0]} to {numbers[-1]}"
        return f"run {numbers[0]} alone" if numbers else "none that finished"

    # -- tables

    def table(
        self, files: Sequence[File], columns: Sequence[str] | None = None, schema: pa.Schema | None = None
    ) -> pa.Table:
        """The rows of these files in order; `schema` is what an empty list yields."""
        tables = [self._read_file(file, columns) for file in files]
        if not tables:
            if schema is None:
                raise LodesetError("no files to read and no schema given")
            return schema.empty_table().select(list(columns or schema.names))
        return pa.concat_tables(tables)

    def _read_file(self, file: File, columns: Sequence[str] | None) -> pa.Table:
        try:
            with self.opened(file) as source:
                return pq.read_table(source, columns=list(columns) if columns is not None else None)
        except pa.ArrowInvalid as error:
            raise self.damaged(file.path, str(error)) from error

    # -- files as they were written

    def check(self, file: File, anew: bool = False) -> None:
        """Compares a file with its digest, once a process unless it changes; `anew` reads it in any case.

        Raises:
            DamagedError: it is missing, or its bytes are not those that were written.
        """
        path = self.path(file.path)
        state = None
        try:
            if self.local:
                found = Path(path).stat()
                state = (found.st_size, found.st_mtime_ns)
            known = _WHOLE.get((path, file.sha256), False)
            if not anew and known is not False and known == state:
                return
            self._agreed(lambda: self._read_through(file), lambda found: _compare(file, *found))
        except FileNotFoundError:
            raise self.damaged(file.path, "a manifest lists it, and it is missing") from None
        except ValueError as error:
            raise self.damaged(file.path, str(error)) from None
        _WHOLE[path, file.sha256] = state

    def _read_through(self, file: File) -> tuple[str, int]:
        with self.explained(f"reading {file.path}"):
            if self.local:
                with open(self.path(file.path), "rb") as source:
                    return _digest_of(source)
            with self.fs.open(self.path(file.path), "rb", cached=False) as source:
                return _digest_of(source)

    def bytes_of(self, file: File) -> bytes:
        """A committed file's bytes.

        Raises:
            DamagedError: it is missing, or its bytes are not those that were written.
        """

        def whole(data: bytes | None) -> bytes:
            if data is None:
                raise self.damaged(file.path, "a manifest lists it, and it is missing")
            _compare(file, hashlib.sha256(data).hexdigest(), len(data))
            return data

        try:
            return self._agreed(lambda: self.read(file.path), whole)
        except ValueError as error:
            raise self.damaged(file.path, str(error)) from None

    def fetch(self, file: File, to: Path) -> None:
        """Copies a committed file of a remote store to this machine.

        Raises:
            DamagedError: it is missing, or its bytes are not those that were written.
        """
        try:
            self.fetch_whole(file, to)
        except FileNotFoundError:
            raise self.damaged(file.path, "a manifest lists it, and it is missing") from None
        except ValueError as error:
            raise self.damaged(file.path, str(error)) from None

    def fetch_whole(self, file: File, to: Path) -> None:
        """The same without a note of what is damaged: raises FileNotFoundError or ValueError."""

        def read() -> tuple[str, int]:
            with (
                self._talking(f"reading {file.path}"),
                to.open("wb") as sink,
                self.fs.open(self.path(file.path), "rb", cached=False) as source,
            ):
                copy = HashingFile(sink)
                while block := source.read(_BLOCK_BYTES):
                    copy.write(block)
            return copy.sha256(), copy.size_bytes

        self._agreed(read, lambda found: _compare(file, *found))

    @contextlib.contextmanager
    def opened(self, file: File) -> Iterator[IO[bytes]]:
        """A committed file for reading, once its digest has been checked; far away it is fetched once, into memory.

        Raises:
            DamagedError: it is missing, or its bytes are not those that were written.
        """
        if not self.local:
            yield io.BytesIO(self.bytes_of(file))
            return
        self.check(file)
        with open(self.path(file.path), "rb") as source:
            yield source

    def damaged(self, relative: str, why: str) -> DamagedError:
        """What to raise for a file that is not what it should be; the store keeps a note, for `run` to make it again."""
        self.note({"path": relative, "why": why})
        return DamagedError(
            f"{shown(self.full_url(relative))} is damaged: {why}. `lodeset run` makes again what is damaged; "
            "`lodeset verify --deep` says what else is",
            why,
        )

    def note(self, told: Mapping[str, str]) -> None:
        """Keeps a note of damage, where the store can be written; once for each thing."""
        name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]
        with contextlib.suppress(OSError, LodesetError):
            self.put_absent(f"{DAMAGED}/{name}.json", sealed(told))


def _compare(file: File, digest: str, size: int) -> None:
    """Raises ValueError: these are not the file's."""
    if size != file.size_bytes:
        raise ValueError(f"it has {size:,} bytes, and {file.size_bytes:,} were written")
    if digest != file.sha256:
        raise ValueError("its bytes are not those that were written (the SHA-256 differs)")


@functools.cache
def code_version() -> str:
    """The version of lodeset that is at work."""
    return version("lodeset")


def _digest_of(source: IO[bytes]) -> tuple[str, int]:
    total, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK_BYTES):
        total.update(block)
        size += len(block)
    return total.hexdigest(), size


def run_path(number: int) -> str:
    return f"{RUNS}/{number:06d}.json"


def artifact_manifest(stage: str, set_: str, fingerprint: str) -> str:
    return f"artifacts/{stage}/{set_}/{fingerprint}/manifest.json"


def piece_path(digest: str) -> str:
    return f"{LISTS}/{digest}.json"


def part_manifest(stage: str, key: str) -> str:
    return f"parts/{stage}/{key}/manifest.json"
