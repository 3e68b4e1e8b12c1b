"""Where results lie: parts and artifacts on any fsspec file system.

```
<store>/parts/<stage>/<key>/<attempt>-<table>.parquet    data, under names that no other attempt uses
<store>/parts/<stage>/<key>/manifest.json                put only if absent: the part is finished
<store>/artifacts/<stage>/<set>/<fingerprint>/manifest.json    likewise: the stage is finished
<store>/claims/...                                       leases; they only save double work
```

A reader follows manifests, so files of an attempt that died are never seen. Nothing is renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline.dag.files import HashingFile, explanation, opened_file_system, published, unreachable
from pipeline.errors import LodesetError
from pipeline.shown import shown


@dataclass(frozen=True)
class File:
    """One committed file. `path` is relative to the store."""

    path: str
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """One committed unit of work: a file a table, and what was counted while making it."""

    key: str
    files: Mapping[str, File]
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Rows:
    """What went in, what came out, what was dropped for which reason."""

    taken: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    def balanced(self) -> bool:
        return self.taken == self.kept + sum(self.dropped.values())


@dataclass(frozen=True)
class Artifact:
    """A finished stage, as its manifest tells it."""

    stage: str
    set: str
    version: int
    fingerprint: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    tables: Mapping[str, tuple[File, ...]]
    rows: Rows
    content: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    created: float = 0.0

    def identity(self, of: str) -> str:
        """What stages downstream depend on: a digest of the content named `of`, or the fingerprint."""
        return self.content[of] if of else self.fingerprint

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Artifact:
        fields = dict(tree)
        fields["tables"] = {name: tuple(File(**f) for f in files) for name, files in tree["tables"].items()}
        fields["rows"] = Rows(**tree["rows"])
        return Artifact(**fields)


class Store:
    """Parts and artifacts under one URL. Picklable: workers open their own connection."""

    def __init__(self, url: str) -> None:
        """Raises LodesetError where the URL's protocol is unknown or its driver is not installed."""
        self.url = url
        self.fs, self.root = opened_file_system(url, "the store", "choose another `store:`")
        self.local = isinstance(self.fs, LocalFileSystem)
        # Object stores begin their paths with a bucket; lodeset never makes one, and objects need no folders.
        self._in_bucket = not self.local and not self.root.startswith("/")

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def path(self, relative: str) -> str:
        return f"{self.root}/{relative}"

    def full_url(self, relative: str) -> str:
        return cast(str, self.fs.unstrip_protocol(self.path(relative))) if not self.local else self.path(relative)

    # -- bytes

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
            bucket = self.root.partition("/")[0]
            raise LodesetError(
                f"the store {shown(self.url)} is not there: nothing called `{shown(bucket)}` was found ({type(error).__name__}). "
                "lodeset makes no buckets: correct `store:`, or create it first"
            ) from error

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
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)

    def read(self, relative: str) -> bytes | None:
        """A file's bytes, None where there is none."""
        try:
            with self._talking(f"reading {relative}"):
                return cast(bytes, self.fs.cat_file(self.path(relative)))
        except FileNotFoundError:
            return None

    def read_json(self, relative: str) -> dict[str, Any] | None:
        data = self.read(relative)
        if data is None:
            return None
        try:
            return cast(dict[str, Any], json.loads(data))
        except ValueError as error:
            raise LodesetError(f"{self.full_url(relative)} is damaged ({error}): delete it and run again") from error

    def replace(self, copy: str, relative: str) -> None:
        """Puts a file in the place of another one; nothing where that was done before. For take-downs alone: everything else in
        a store is written once."""
        with self.explained(f"replacing {relative}"), contextlib.suppress(FileNotFoundError):
            if self.local:
                os.replace(self.path(copy), self.path(relative))
            else:
                self.fs.mv(self.path(copy), self.path(relative))

    def replace_json(self, relative: str, tree: Mapping[str, Any]) -> None:
        """Likewise, a manifest."""
        copy = f"{relative}.{uuid.uuid4().hex}"
        self.put_absent(copy, json.dumps(tree, indent=1).encode())
        self.replace(copy, relative)

    def delete(self, relative: str) -> None:
        with contextlib.suppress(FileNotFoundError):
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

        Where that name is taken already (an attempt that was killed before it committed), the file that was there stays,
        and size and digest are those of that file.
        """
        path = self.path(relative)
        with self.explained(f"writing {relative}"):
            self._make_folder(path.rsplit("/", 1)[0])
            temporary = f"{path}.{uuid.uuid4().hex}" if self.local else path
            # Closed below by hand: an object store publishes on close, which must not happen after an error.
            raw = open(temporary, "xb") if self.local else self.fs.open(path, "wb")  # noqa: SIM115
            sink = HashingFile(cast(IO[bytes], raw))
            try:
                yield sink
                sink.flush()
                if self.local:
                    os.fsync(raw.fileno())
                raw.close()
                if self.local and not published(temporary, path):
                    sink.measure(path)
            except BaseException:
                # fsspec publishes a remote file when it is closed, be it by the garbage collector, unless it is discarded.
                if isinstance(raw, AbstractBufferedFile):
                    raw.discard()
                    raw.closed = True
                else:
                    with contextlib.suppress(OSError):
                        raw.close()
                raise
            finally:
                if self.local:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary)

    def write_named(self, relative: str, data: pa.Table) -> File:
        """One Parquet file."""
        with self.writing(relative) as sink:
            pq.write_table(data, sink, compression="zstd", row_group_size=16_384)
        return File(relative, data.num_rows, sink.size_bytes, sink.sha256())

    # -- parts

    def part(self, stage: str, key: str) -> Part | None:
        tree = self.read_json(f"parts/{stage}/{key}/manifest.json")
        if tree is None:
            return None
        return Part(tree["key"], {n: File(**f) for n, f in tree["files"].items()}, tree["counts"], tree["seconds"])

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
        part = Part(key, {**written, **(files or {})}, dict(counts or {}), seconds)
        if self.put_absent(f"{folder}/manifest.json", json.dumps(asdict(part), indent=1).encode()):
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
        tree = self.read_json(f"artifacts/{stage}/{set_}/{fingerprint}/manifest.json")
        return None if tree is None else Artifact.from_json(tree)

    def history(self, stage: str, set_: str) -> list[Artifact]:
        """Every finished artifact of a stage and set, newest first."""
        folder = f"artifacts/{stage}/{set_}"
        found = [self.artifact(stage, set_, fingerprint) for fingerprint in self.names(folder)]
        return sorted((a for a in found if a is not None), key=lambda a: (-a.created, a.fingerprint))

    def commit_artifact(self, artifact: Artifact) -> Artifact:
        """Puts the manifest if there is none; whoever came first is returned."""
        data = json.dumps(artifact.to_json(), indent=1).encode()
        if self.put_absent(_manifest(artifact), data):
            return artifact
        earlier = self.artifact(artifact.stage, artifact.set, artifact.fingerprint)
        assert earlier is not None, f"{_manifest(artifact)} exists and cannot be read"
        return earlier

    def replace_artifact(self, artifact: Artifact) -> None:
        """Puts it in the place of that with its fingerprint."""
        self.replace_json(_manifest(artifact), artifact.to_json())

    def delete_artifact(self, artifact: Artifact) -> None:
        """Its manifest; the parts that it lists may be another's, too."""
        self.delete(_manifest(artifact))

    def manifest_path(self, artifact: Artifact) -> str:
        return self.full_url(_manifest(artifact))

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
            with self.fs.open(self.path(file.path), "rb") as source:
                return pq.read_table(source, columns=list(columns) if columns is not None else None)
        except FileNotFoundError:
            raise LodesetError(
                f"{self.full_url(file.path)} is listed in a manifest and missing: the store was changed by hand"
            ) from None
        except pa.ArrowInvalid as error:
            raise LodesetError(f"{self.full_url(file.path)} is damaged: {error}") from error


def _manifest(artifact: Artifact) -> str:
    return f"artifacts/{artifact.stage}/{artifact.set}/{artifact.fingerprint}/manifest.json"
