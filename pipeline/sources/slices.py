"""Files -> slices, the units that ingest commits.

A tar or zip archive is cut by ranges of members, so that one large archive keeps every core busy; a compressed tar into a few
such ranges, because each is read from the start of the file; Parquet by runs of row groups; a list by runs of rows; loose files
by the hash of their relative path, so that a new file does not shift the others. Sidecars are put to their images before, over
the whole file or folder, so that what is read does not depend on how it is cut.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Container as Holding
from dataclasses import dataclass

from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.cells import NoImages
from lodeset.pipeline.sources.containers import LOOSE, Container, container_of
from lodeset.pipeline.sources.files import Bytes
from lodeset.pipeline.sources.listing import SourceFile, check_state
from lodeset.pipeline.sources.members import Member, bounded, joined, reported_once, without_excluded

_TAR_HEADER_BYTES = 512
_LOOSE_FILES = 2_000


@dataclass(frozen=True)
class Slice:
    """A run of members of one file, or loose files of one root (then `members` are paths relative to it).

    `states` says what the bytes were when listed: of the file, or of every loose file, sidecars included.
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
    """What a file that is no loose one holds, by its headers. One that is none holds one refused member, as does the end of one
    whose members would not fit into memory.

    Raises:
        LodesetError: the file system does not give the file.
    """
    with Bytes(file.uri) as raw:
        try:
            listed = _container(file.kind).members(raw, file)
            return list(bounded(listed, lambda member: member, _not_listed))
        except LodesetError:
            raise
        except NoImages as error:
            reason = "wrong_image_column" if error.meant else "no_image_column"
            return [Member("", 0, file.size_bytes, reason, str(error)[:1_000])]
        except Exception as error:
            # Parsers of archives raise anything on crafted input; the archive is then one counted reject.
            return [Member("", 0, file.size_bytes, "unreadable_archive", f"{type(error).__name__}: {error}"[:200])]


def chosen_members(file: SourceFile, members: list[Member]) -> list[Member]:
    """The members of a file, with sidecars put to their images, and those that its source leaves out told as such."""
    container = _container(file.kind)
    if container.grouped:  # rows have no names that patterns could mean
        return members
    if container.sidecars:
        members = joined(list(without_excluded(members, file.members, sidecars=True)))
    return list(without_excluded(members, file.members))


def _container(kind: str) -> Container:
    container = container_of(kind)
    assert container is not None, f"{kind} files hold no others"
    return container


def _not_listed(member: Member, detail: str) -> Member:
    return Member("", member.offset, 0, "unreadable_archive", detail)


def check_unchanged(piece: Slice, uris: Holding[str] | None = None) -> None:
    """Looks whether a slice's files are those that were listed: the file that holds the members; of loose files, and of
    those that a list names, the ones among `uris` (all that is said of the others is what their bytes say).

    Raises:
        LodesetError: one of them changed or is gone.
    """
    container = container_of(piece.kind)
    if container is not None and container.check is not None:
        if uris is not None and piece.uri in uris:
            container.check(piece)
    elif container is not None:
        state, size = piece.states
        check_state(piece.uri, state, int(size))
    elif uris is not None:
        files = (file for member in piece.members for file in (member, *member.sidecars))
        for file, state in zip(files, piece.states, strict=True):
            uri = f"{piece.root}/{file.name}"
            if uri in uris:
                check_state(uri, state, file.size_bytes)


def cut(file: SourceFile, members: Sequence[Member], slice_bytes: int) -> list[Slice]:
    """The chosen members of one file -> slices of at most `slice_bytes` (or one image, or one row group), or as few as its kind asks
    for."""
    container = _container(file.kind)
    # A row that is added to a list changes no slice of other rows: each member says what it was.
    state = () if container.elsewhere else (file.state, str(file.size_bytes))
    units: Iterable[list[Member]] = ([m] for m in reported_once(members))
    if container.grouped:
        units = (list(group) for _, group in itertools.groupby(members, key=lambda m: m.offset))
    sizes = [m.total_bytes + _TAR_HEADER_BYTES for m in members]
    if container.sequential:
        slice_bytes = max(slice_bytes, sum(sizes) // container.most_slices + max(sizes, default=0))
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


def loose_members(files: Iterable[SourceFile]) -> Iterator[tuple[SourceFile, Member]]:
    """Loose files -> those that are (or should be) images, each with its sidecars, which lie anywhere below the same root."""
    by_root: dict[str, dict[str, SourceFile]] = {}
    for file in files:
        by_root.setdefault(file.root, {})[file.relative] = file
    for _, inside in sorted(by_root.items()):
        members: list[Member] = []
        for file in inside.values():
            member = Member(file.relative, 0, file.size_bytes, "not_a_file" if file.refused else "", file.refused)
            members += without_excluded([member], file.members, sidecars=True)
        for member in joined(sorted(members, key=lambda m: (m.sample, m.name))):
            file = inside[member.name]
            for one in without_excluded([member], file.members):
                yield file, one


def split_loose(
    files: Sequence[SourceFile], slice_bytes: int, taken: Callable[[SourceFile, Member], bool] = lambda *_: True
) -> list[Slice]:
    """Loose files -> slices of the images that are `taken`, by the hash of an image's relative path; sidecars go with them.

    Linear hashing: one slice more splits one slice in two and leaves the others as they are.
    """
    states = {(f.root, f.relative): f.state for f in files}
    chosen = [(f.root, m) for f, m in loose_members(files) if taken(f, m)]
    slices = []
    for root, of_root in itertools.groupby(chosen, key=lambda pair: pair[0]):
        members = reported_once([m for _, m in of_root])
        total = sum(m.total_bytes for m in members)
        slots = max(1, math.ceil(total / slice_bytes), math.ceil(len(members) / _LOOSE_FILES))
        by_slot: dict[int, list[Member]] = {}
        for member in members:
            by_slot.setdefault(_slot(member.name, slots), []).append(member)
        for _, inside in sorted(by_slot.items()):
            read = (file.name for m in inside for file in (m, *m.sidecars))
            slices.append(Slice(LOOSE, root, "", tuple(states[root, name] for name in read), tuple(inside)))
    return slices


def _slot(name: str, slots: int) -> int:
    """`slots` = 2^L + s: the first s of 2^L slots are split in two, by one bit more of the hash."""
    doubled = 1 << (slots - 1).bit_length()
    slot = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % doubled
    return slot if slot < slots else slot - doubled // 2
