"""Files -> slices, the units that ingest commits.

A tar is cut by ranges of members, so that one large tar keeps every core busy; Parquet by runs of row groups; loose files by
the hash of their relative path, so that a new file does not shift the others.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import LodesetError
from pipeline.sources.files import Bytes
from pipeline.sources.listing import SourceFile
from pipeline.sources.members import Member, joined
from pipeline.sources.parquet import parquet_members
from pipeline.sources.tars import tar_members

_TAR_HEADER_BYTES = 512
_LOOSE_FILES = 2_000


@dataclass(frozen=True)
class Slice:
    """A run of members of one file, or loose files of one root (then `members` are paths relative to it).

    `states` says what the bytes were when listed: of the file, or of every loose file.
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


def members_of(file: SourceFile) -> list[Member]:
    """What a tar or Parquet file holds, by its headers. One that is none holds one refused member.

    Raises:
        LodesetError: the file system does not give the file.
    """
    with Bytes(file.uri) as raw:
        try:
            return list(tar_members(raw, file.size_bytes) if file.kind == "tar" else parquet_members(raw, file.image))
        except LodesetError:
            raise
        except Exception as error:
            # Parsers of archives raise anything on crafted input; the archive is then one counted reject.
            return [Member("", 0, file.size_bytes, "unreadable_archive", f"{type(error).__name__}: {error}"[:200])]


def cut(file: SourceFile, members: Sequence[Member], slice_bytes: int) -> list[Slice]:
    """The members of one file, joined if it is a tar -> slices of at most `slice_bytes` (or one image, or one row group)."""
    state = (file.state, str(file.size_bytes))
    units: Iterable[list[Member]] = ([m] for m in members)
    if file.kind == "parquet":
        units = (list(group) for _, group in itertools.groupby(members, key=lambda m: m.offset))
    runs = _runs(units, slice_bytes)
    return [Slice(file.kind, file.root, file.relative, state, tuple(run), file.image) for run in runs]


def _runs(units: Iterable[list[Member]], slice_bytes: int) -> Iterator[list[Member]]:
    run: list[Member] = []
    size = 0
    for unit in units:
        more = sum(m.total_bytes for m in unit) + _TAR_HEADER_BYTES
        if run and size + more > slice_bytes:
            yield run
            run, size = [], 0
        run += unit
        size += more
    if run:
        yield run


def loose_member(file: SourceFile) -> Member:
    return Member(file.relative, 0, file.size_bytes, "not_a_file" if file.refused else "", file.refused)


def split_loose(files: Sequence[SourceFile], slice_bytes: int) -> list[Slice]:
    """Loose files -> slices by the hash of the relative path without its extensions (sidecars stay with their image).

    Linear hashing: one slice more splits one slice in two and leaves the others as they are.
    """
    slices = []
    for root in sorted({f.root for f in files}):
        inside = sorted((f for f in files if f.root == root), key=lambda f: f.relative)
        total = sum(f.size_bytes for f in inside)
        slots = max(1, math.ceil(total / slice_bytes), math.ceil(len(inside) / _LOOSE_FILES))
        by_slot: dict[int, list[SourceFile]] = {}
        for f in inside:
            by_slot.setdefault(_slot(Member(f.relative, 0, 0).sample, slots), []).append(f)
        for slot in sorted(by_slot):
            chosen = by_slot[slot]
            members = [loose_member(f) for f in chosen]
            slices.append(Slice("loose", root, "", tuple(f.state for f in chosen), tuple(joined(members))))
    return slices


def _slot(name: str, slots: int) -> int:
    """`slots` = 2^L + s: the first s of 2^L slots are split in two, by one bit more of the hash."""
    doubled = 1 << (slots - 1).bit_length()
    slot = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % doubled
    return slot if slot < slots else slot - doubled // 2
