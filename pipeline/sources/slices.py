"""Files -> slices, the units that ingest commits.

A tar is cut by ranges of members, so that one large tar keeps every core busy; loose files by the hash of their relative
path, so that a new file does not shift the others; Parquet by row groups.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import fsspec
import pyarrow.parquet as pq

from pipeline.errors import LodesetError
from pipeline.sources.listing import SourceFile

# Members that say something about the image that shares their name up to the first dot (the WebDataset convention).
SIDECARS = (".json", ".txt", ".cls")


@dataclass(frozen=True)
class Member:
    """Encoded bytes that may be an image, or what is known to be none (`reason`)."""

    name: str
    offset: int
    size_bytes: int
    reason: str = ""
    detail: str = ""

    @property
    def sample(self) -> str:
        """What a WebDataset sample's members share: the path up to the first dot of the file name."""
        folder, base = posixpath.split(self.name)
        return posixpath.join(folder, base.split(".", 1)[0])

    @property
    def is_sidecar(self) -> bool:
        return posixpath.splitext(self.name.lower())[1] in SIDECARS


@dataclass(frozen=True)
class Slice:
    """A run of members of one file, or loose files of one root (then `members` are paths relative to it).

    `states` says what the bytes were when listed: one entry for the file, or one a loose file.
    """

    kind: str
    root: str
    relative: str
    states: tuple[str, ...]
    members: tuple[Member, ...]
    image: str = ""

    @property
    def uri(self) -> str:
        return f"{self.root}/{self.relative}" if self.relative else self.root

    @property
    def size_bytes(self) -> int:
        return sum(m.size_bytes for m in self.members)


def members_of(file: SourceFile) -> list[Member]:
    """What a tar or Parquet file holds, by its headers. One that cannot be opened holds one refused member.

    Raises:
        LodesetError: the file system does not give the file now; what it holds is not known.
    """
    try:
        return list(_tar_members(file) if file.kind == "tar" else _parquet_members(file))
    except FileNotFoundError as error:
        return [Member("", 0, file.size_bytes, "missing", str(error))]
    except (PermissionError, TimeoutError, ConnectionError) as error:
        raise LodesetError(
            f"{file.uri} cannot be read now ({type(error).__name__}: {error}): mend that and run again"
        ) from error
    except Exception as error:
        # Parsers of archives raise anything on crafted input; the archive is then one counted reject.
        return [Member("", 0, file.size_bytes, "unreadable_archive", f"{type(error).__name__}: {error}"[:200])]


def cut(file: SourceFile, members: Sequence[Member], slice_bytes: int) -> list[Slice]:
    """The members of one file -> slices of at most `slice_bytes` (or one sample, or one row group)."""
    state = (file.state, str(file.size_bytes))
    runs = _by_bytes(members, slice_bytes) if file.kind == "tar" else _by_row_group(members)
    return [Slice(file.kind, file.root, file.relative, state, tuple(run), file.image) for run in runs]


def split_loose(files: Sequence[SourceFile], slice_bytes: int) -> list[Slice]:
    """Loose files -> slices by the hash of the relative path without its extensions (sidecars stay with their image)."""
    slices = []
    for root in sorted({f.root for f in files}):
        inside = [f for f in files if f.root == root]
        # A power of two, so that a new file changes one slice only, until the folder has doubled.
        total = sum(f.size_bytes for f in inside)
        slots = 2 ** math.ceil(math.log2(max(1.0, total / slice_bytes, len(inside) / 2_000)))
        by_slot: dict[int, list[SourceFile]] = {}
        for f in inside:
            name = Member(f.relative, 0, 0).sample
            by_slot.setdefault(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % slots, []).append(f)
        for slot in sorted(by_slot):
            chosen = sorted(by_slot[slot], key=lambda f: f.relative)
            slices.append(
                Slice(
                    "loose",
                    root,
                    "",
                    tuple(f.state for f in chosen),
                    tuple(Member(f.relative, 0, f.size_bytes) for f in chosen),
                )
            )
    return slices


def _by_bytes(members: Sequence[Member], slice_bytes: int) -> Iterator[list[Member]]:
    run: list[Member] = []
    size = 0
    for member in members:
        # A sample's members stay together: the sidecar says what its image is.
        if run and size + member.size_bytes > slice_bytes and member.sample != run[-1].sample:
            yield run
            run, size = [], 0
        run.append(member)
        size += member.size_bytes
    if run:
        yield run


def _by_row_group(members: Sequence[Member]) -> Iterator[list[Member]]:
    for group in sorted({m.offset for m in members}):
        yield [m for m in members if m.offset == group]


def _tar_members(file: SourceFile) -> Iterator[Member]:
    with fsspec.open(file.uri, "rb") as raw:
        yield from tar_members(raw, file.size_bytes)


def tar_members(raw: IO[bytes], size_bytes: int) -> Iterator[Member]:
    """Regular members by their headers; links, devices and whatever lies past the end of the file come with a reason.

    Bytes that are no member (a damaged header, and what it described) come as one refused member, and the reader goes on
    at the next valid header: so does it after the end of an archive to which another was appended.
    """
    with tarfile.open(fileobj=raw, mode="r:") as tar:
        tar.ignore_zeros = True  # skips what is no header; the first one was read, so this is a tar
        last, end = -1, 0
        while True:
            try:
                entry = tar.next()
            except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
                if tar.offset >= size_bytes:
                    return  # only the padding after the last member is missing
                yield Member("", max(last, 0), 0, "unreadable_archive", f"{type(error).__name__}: {error}"[:200])
                return
            lost = _first_nonzero(raw, end, size_bytes if entry is None else entry.offset)
            if lost is not None:
                stop = size_bytes if entry is None else entry.offset
                yield Member("", lost, 0, "unreadable_archive", f"bytes {lost} to {stop} belong to no member")
            if entry is None:
                break
            # A crafted size can send the reader backwards for ever (CVE-2025-8194).
            if entry.offset <= last:
                yield Member(_utf8(entry.name), entry.offset, 0, "unreadable_archive", "members go backwards")
                return
            last, end = entry.offset, tar.offset
            if entry.isdir():
                continue
            if not entry.isreg() or entry.sparse is not None:
                yield Member(_utf8(entry.name), entry.offset_data, 0, "not_a_file", f"tar entry of type {entry.type!r}")
            elif entry.size < 0 or entry.offset_data + entry.size > size_bytes:
                yield Member(
                    _utf8(entry.name),
                    entry.offset_data,
                    0,
                    "truncated",
                    f"{entry.size} bytes promised, the archive ends before",
                )
                return
            else:
                yield Member(_utf8(entry.name), entry.offset_data, entry.size)
            # tarfile keeps every member it has seen; a billion-member crawl must not.
            tar.members = []  # type: ignore[attr-defined]  # public in CPython, not in its stubs


def _utf8(name: str) -> str:
    """A member's name as text that every table can hold; bytes that are no UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _first_nonzero(raw: IO[bytes], start: int, stop: int) -> int | None:
    """Where the first byte that is not zero lies in start..stop; None where there is none."""
    raw.seek(start)
    while start < stop and (block := raw.read(min(2**20, stop - start))):
        stripped = block.lstrip(b"\0")
        if stripped:
            return start + len(block) - len(stripped)
        start += len(block)
    return None


def _parquet_members(file: SourceFile) -> Iterator[Member]:
    with fsspec.open(file.uri, "rb") as raw:
        footer = pq.ParquetFile(raw)
        names = footer.schema_arrow.names
        if file.image not in names:
            raise ValueError(f"no column `{file.image}`; there are: {', '.join(names)}")
        for group in range(footer.num_row_groups):
            meta = footer.metadata.row_group(group)
            rows = max(1, meta.num_rows)
            sizes = [meta.column(c) for c in range(meta.num_columns)]
            image_bytes = sum(c.total_uncompressed_size for c in sizes if c.path_in_schema.split(".")[0] == file.image)
            for row in range(meta.num_rows):
                yield Member(f"{file.image}/{row}", group, image_bytes // rows)
