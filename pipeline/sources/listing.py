"""Which files a source means, before any is opened."""

from __future__ import annotations

import collections
import fnmatch
import functools
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lodeset.pipeline import own
from lodeset.pipeline.config import Source
from lodeset.pipeline.dag.files import opened_file_system, reaching, why_not_there
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote.blocks import state_of
from lodeset.pipeline.remote.file_system import file_system
from lodeset.pipeline.shown import shown
from lodeset.pipeline.sources.choice import Members, matches
from lodeset.pipeline.sources.containers import LOOSE, container_of, recognized
from lodeset.pipeline.sources.files import cannot_be_read, escaped, unescaped

# What holds others and is of no kind that is read.
PACKED = (".gz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")


@dataclass(frozen=True)
class SourceFile:
    r"""A file as a listing shows it. Names are valid UTF-8; bytes of them that are not are written `\xNN`.

    Attributes:
        root: the folder that `relative` starts from; moving the folder changes this and nothing else.
        state: entity tag, or modification time: changes when the content does.
        kind: that of its container (`sources/containers.py`), or loose.
        image: the column of images, where its kind has columns.
        folder: of a list: where the user says that the paths in it start; "": where the list lies.
        source: the path of the configuration that it was found by.
        on_unreadable: what its source says to do about files that cannot be read; None: nothing.
        refused: why this is no file that can be read (a link that leads nowhere, a pipe).
        members: which of its members (or whether itself, if loose) the source wants.
        namesakes: how many files before it in the set have the same relative path, below another root or for another column.
    """

    root: str
    relative: str
    kind: str
    size_bytes: int
    state: str
    image: str = ""
    refused: str = ""
    members: Members = field(default_factory=Members)
    source: str = ""
    on_unreadable: Literal["stop", "count"] | None = None
    namesakes: int = 0
    folder: str = ""

    @property
    def uri(self) -> str:
        return f"{self.root}/{self.relative}"


def expand(sources: Sequence[Source], what: str, left_out: list[str] | None = None) -> list[SourceFile]:
    """Every file of these sources, in the order of the configuration, then by path.

    Links are followed. Files and folders whose names start with a dot (`.DS_Store`, `.git`) are left out, and so is what a source
    excludes. What lodeset made itself (`pipeline/own.py`) is put into `left_out`.

    Raises:
        LodesetError: a source matches nothing, a folder is empty, or it is packed or lodeset's own; `what` names the set.
    """
    files: dict[tuple[str, str], SourceFile] = {}
    for source in sources:
        skipped = _Skipped(source)
        found = _expand_one(source, what, skipped)
        if not found:
            raise LodesetError(_nothing(source, what, skipped))
        for file in found:
            known = files.setdefault((file.uri, file.image), file)
            if known.members != file.members:
                raise LodesetError(f"{what}: {file.uri} lies in two sources with different `members`: give one of them")
        if left_out is not None:
            left_out += [path for path in skipped.own if path not in left_out]
    counted: collections.Counter[str] = collections.Counter()
    out = []
    for file in files.values():
        out.append(replace(file, namesakes=counted[file.relative]))
        counted[file.relative] += 1
    return out


def image_bytes(files: Iterable[SourceFile]) -> int:
    """Bytes of images that these files hold or name, roughly."""
    containers = ((file, container_of(file.kind)) for file in files)
    return sum(file.size_bytes * (container.expansion if container else 1) for file, container in containers)


def _nothing(source: Source, what: str, skipped: _Skipped) -> str:
    if skipped.own:
        return (
            f"{what}: all that {source.uri} holds was made by lodeset ({skipped.own[0]}), which is never a source: give the images "
            f"that it was made from (to train on shards, their index.parquet)"
        )
    excluded = f" but {skipped.excluded} that `exclude` leaves out" if skipped.excluded else ""
    return (
        f"{what}: {source.uri} holds no files{excluded}: give a folder of images, an archive (.tar, .tar.gz, .tar.zst, .zip), a .parquet, "
        "or a list (.csv, .jsonl)"
    )


class _Skipped:
    """What a listing of one source passes over: what it excludes, and what lodeset made."""

    def __init__(self, source: Source) -> None:
        self._patterns = source.exclude
        self.base = ""  # where the paths that patterns are compared with start
        self.excluded = 0
        self.own: list[str] = []
        self.kind = functools.cache(own.kind_of)  # of a folder: many files lie in one

    def by_pattern(self, path: str) -> bool:
        wanted = bool(self._patterns) and matches(posixpath.relpath(path, self.base or "/"), self._patterns)
        self.excluded += wanted
        return wanted

    def as_own(self, folder: str) -> bool:
        if folder and folder not in self.own:
            self.own.append(folder)
        return bool(folder)


def _expand_one(source: Source, what: str, skipped: _Skipped) -> list[SourceFile]:
    # A path may hold the sign by which URLs name a chain of file systems: `a::b`.
    local = "://" not in source.uri and "::" in source.uri
    here = f"{what}: {shown(source.uri)}"
    fs, path = (LocalFileSystem(), source.uri) if local else opened_file_system(source.uri, f"{what}:", "use a path")
    path = path.rstrip("/") or "/"
    try:
        # A path may hold the signs of a glob: `new [1]/a.tar`.
        with reaching(here):
            plain = fs.exists(path)
            roots = [path] if plain else _globbed(fs, path) if fsspec.core.has_magic(path) else []
            skipped.base = (
                path if plain and fs.isdir(path) else posixpath.dirname(path if plain else _before_glob(path))
            )
            listing = _local if isinstance(fs, LocalFileSystem) else _remote
            found = [file for root in roots for file in listing(fs, root, skipped)]
    except OSError as error:
        told = escaped(str(error))
        raise LodesetError(f"{what}: {source.uri} cannot be listed: {told}: correct that and run again") from error
    if not roots:
        unanswered = None if isinstance(fs, LocalFileSystem) else why_not_there(fs, path, here)
        if unanswered:
            raise LodesetError(unanswered)
        raise LodesetError(
            f"{what}: nothing is at {source.uri}: check the path (relative paths start from the configuration file)"
        )
    if found and all(file.kind == LOOSE and file.relative.lower().endswith(PACKED) for file in found):
        raise LodesetError(
            f"{what}: {escaped(found[0].uri)} is compressed or packed in a way that is not read: unpack it to a folder, or pack it again "
            "as .tar, .tar.gz, .tar.zst or .zip"
        )
    if source.folder is not None and not any(_is_list(file) for file in found):
        raise LodesetError(
            f"{what}: `folder:` says where the paths of a list start, and {source.uri} is no list (.csv, .jsonl): remove it"
        )
    files = []
    for file in found:
        root = str(fs.unstrip_protocol(file.root)) if "://" in source.uri else file.root
        container = container_of(file.kind)
        files.append(
            replace(
                file,
                root=escaped(root).rstrip("/"),
                relative=escaped(file.relative),
                image=source.image if container is not None and container.image_column else "",
                folder=source.folder or "" if _is_list(file) else "",
                members=source.members,
                source=source.uri,
                on_unreadable=source.on_unreadable,
            )
        )
    return files


def _is_list(file: SourceFile) -> bool:
    container = container_of(file.kind)
    return container is not None and container.elsewhere


def _before_glob(pattern: str) -> str:
    """The path up to the first piece with a sign of a glob, and that piece."""
    pieces = pattern.split("/")
    first = next((n for n, piece in enumerate(pieces) if fsspec.core.has_magic(piece)), len(pieces))
    return "/".join(pieces[: first + 1])


def _globbed(fs: Any, pattern: str) -> list[str]:
    """What matches; hidden names only where the pattern says so (`.cache/*.tar`)."""
    dotted = [piece for piece in pattern.split("/") if piece.startswith(".")]

    def hidden(path: str) -> bool:
        pieces = (piece for piece in path.split("/") if piece.startswith("."))
        return any(not any(fnmatch.fnmatchcase(piece, d) for d in dotted) for piece in pieces)

    return [path for path in sorted(fs.glob(pattern)) if not hidden(path)]


def _kind(path: str, named: bool) -> str:
    """The kind of a file by its name; `named`: whether a source names the file itself, not a folder around it."""
    container = recognized(path)
    return LOOSE if container is None or (container.elsewhere and not named) else container.kind


# -- object stores and the like


def _remote(fs: Any, root: str, skipped: _Skipped) -> Iterator[SourceFile]:
    info = fs.info(root)
    folder = info["type"] == "directory"
    inside = fs.find(root, detail=True) if folder else {root: info}
    kind = functools.partial(own.remote_kind, fs)
    above = own.within(root, kind=kind) if folder else own.within(*posixpath.split(root), kind=kind)
    marked = {above} if above else own.folders_among(inside, kind) if folder else set()
    if not folder:
        root = posixpath.dirname(root)
    for name in sorted(inside):
        relative = posixpath.relpath(name, root)
        if _hidden(relative) or inside[name]["type"] != "file" or skipped.by_pattern(name):
            continue
        if skipped.as_own(next((one for one in marked if f"{name}/".startswith(f"{one}/")), "")):
            continue
        size = int(inside[name].get("size") or 0)
        yield SourceFile(root, relative, _kind(relative, not folder), size, state_of(inside[name]))


def _hidden(relative: str) -> bool:
    return any(piece.startswith(".") for piece in relative.split("/"))


def check_state(uri: str, state: str, size_bytes: int) -> None:
    """Looks whether a file is the one that was listed. What was listed as no file has no state.

    Raises:
        LodesetError: it changed, or the file system does not show it.
    """
    if not state:
        return
    name = unescaped(uri)
    try:
        fs, _ = file_system(name.partition("::")[0])
        if isinstance(fs, LocalFileSystem):
            status = Path(fs._strip_protocol(name)).stat()
            now, size = str(status.st_mtime_ns), status.st_size
        else:
            fs.invalidate_cache()
            info = fs.info(name)
            now, size = state_of(info), int(info.get("size") or 0)
    except Exception as error:
        raise cannot_be_read(uri, error) from error
    if now != state or size != size_bytes:
        raise LodesetError(
            f"{uri} changed while it was read ({size_bytes} bytes were listed, {size} are there now): nothing was recorded about it; "
            "run again"
        )


# -- this machine's file system: fsspec leaves links and folders without rights out, without a word


def _local(fs: LocalFileSystem, root: str, skipped: _Skipped) -> list[SourceFile]:
    if skipped.as_own(_own_at(root, skipped)):
        return []
    if os.path.isdir(root):
        return sorted(_walk(root, skipped), key=lambda file: file.relative)
    folder, name = posixpath.split(root)
    if _hidden(name) or skipped.by_pattern(root):
        return []
    return [_described(folder, name, Path(root).stat(), named=True)]


def _own_at(path: str, skipped: _Skipped) -> str:
    """What makes a path lodeset's own, wherever links lead; "" if it is not."""
    real = os.path.realpath(path)
    above = (
        own.within(real, kind=skipped.kind)
        if os.path.isdir(real)
        else own.within(*posixpath.split(real), kind=skipped.kind)
    )
    return path if above == real or own.is_page(real) else above


def _walk(root: str, skipped: _Skipped) -> Iterator[SourceFile]:
    """Every file below a folder, in an order that does not depend on the file system's.

    A folder that several paths lead to is listed once: by its own path, if that lies below the root. A link to a file is a
    file of its own. What cannot be listed stops the run, unless it lies behind a link: whoever made that may not know.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = collections.deque([("", False)]), collections.deque[tuple[str, bool]]()
    while folders or links:
        below, linked = folders.popleft() if folders else links.popleft()
        here = posixpath.join(root, below) if below else root
        try:
            status = Path(here).stat()
            if (status.st_dev, status.st_ino) in seen:
                yield _refused(root, below, "a link to a folder that is listed already")
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not linked:
                raise
            yield _refused(root, below, f"a folder behind a link that cannot be listed: {error.strerror}")
            continue
        mine = own.skipped_in(here, [entry.name for entry in entries], skipped.kind)
        for entry in entries:
            relative = posixpath.join(below, entry.name)
            path = posixpath.join(root, relative)
            if entry.name.startswith(".") or skipped.by_pattern(path):
                continue
            if skipped.as_own(path if entry.name in mine else ""):
                continue
            link = entry.is_symlink()
            try:
                status = entry.stat()
            except OSError as error:
                if not (link or linked):
                    raise
                what = "a link that leads nowhere" if link else "a file behind a link that cannot be looked at"
                yield _refused(root, relative, f"{what}: {error.strerror}")
                continue
            if stat.S_ISDIR(status.st_mode):
                own_folder = (
                    _own_at(path, skipped) if link else path if skipped.kind(path) not in ("", "shared") else ""
                )
                if not skipped.as_own(own_folder):
                    (links if link else folders).append((relative, link or linked))
            elif not skipped.as_own(_own_at(path, skipped) if link else path if own.is_page(path) else ""):
                yield _described(root, relative, status)


def _described(root: str, relative: str, status: os.stat_result, named: bool = False) -> SourceFile:
    if not stat.S_ISREG(status.st_mode):
        return _refused(root, relative, "a pipe, socket or device")
    return SourceFile(root, relative, _kind(relative, named), status.st_size, str(status.st_mtime_ns))


def _refused(root: str, relative: str, why: str) -> SourceFile:
    return SourceFile(root, relative, LOOSE, 0, "", refused=why)
