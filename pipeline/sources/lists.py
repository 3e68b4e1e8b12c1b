"""Lists of paths: a row of a CSV file, or a line of JSON, names an image and says what else is known about it.

A list comes from a stranger as often as an archive does, so its paths lead nowhere but into the list's own folder, or the one that
the user names (`folder:`). Links in that folder are followed, as everywhere: whoever made the folder made them, not the list.
"""

from __future__ import annotations

import codecs
import csv
import errno
import functools
import hashlib
import itertools
import json
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from lodeset.pipeline import own
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote.blocks import state_of
from lodeset.pipeline.remote.file_system import file_system
from lodeset.pipeline.sources.cells import NoImages
from lodeset.pipeline.sources.containers import Alive, Container
from lodeset.pipeline.sources.files import Bytes, cannot_be_read, changed, escaped, unescaped
from lodeset.pipeline.sources.listing import SourceFile, check_state
from lodeset.pipeline.sources.members import Member, Sample
from lodeset.pipeline.sources.metadata import BadMetadata, partition_fields, plain
from lodeset.pipeline.sources.reading import needed, sample_of
from lodeset.pipeline.sources.slices import Slice

_ROW_BYTES = 2**20
_CHUNK = 2**18
_PATH = 4_096
_DELIMITERS = (",", ";", "\t")
# What the column of paths is called where nothing says it, after `image:`.
_PATHS = (
    "path",
    "file_name",
    "filename",
    "file",
    "filepath",
    "file_path",
    "image_path",
    "image_file",
    "img",
    "img_path",
)
_AT_ONCE = 32  # files on a remote file system that are asked for at the same time
_IN_MEMORY = 4_096  # rows whose files are asked for together
_BYTES_A_BYTE = 500  # of images, for each of a list: a row of 100 bytes names an image of 50 kB
_LONE = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")  # half of a surrogate pair, which JSON can hold and no file system
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)


@dataclass(frozen=True)
class Row:
    """One row of a list; `wrong` says why it has no fields, `doubtful` why they may belong to other columns."""

    offset: int
    data: bytes
    fields: Mapping[str, Any]
    wrong: str = ""
    doubtful: str = ""

    @property
    def digest(self) -> str:
        """Of what it says; the last row of a list gets the end of its line when another is added."""
        return hashlib.sha256(self.data.rstrip(b"\r\n")).hexdigest()[:16]


Rows = Callable[[Bytes, int], Iterator[Row]]  # the rows of a list from that byte on (0: from the first)


def _valid(text: str) -> str:
    """Text of a list as tables can hold it."""
    return escaped(text).encode("utf-8", "backslashreplace").decode()


def _lines(raw: Bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """The lines from `start` on, each with where it begins.

    Raises:
        ValueError: one is longer than any row should be.
    """
    raw.seek(start)
    at, held = start, b""
    while True:
        chunk = raw.read(_CHUNK)
        *whole, held = (held + chunk).split(b"\n")
        for line in whole:
            yield at, line + b"\n"
            at += len(line) + 1
        if not chunk:
            if held:
                yield at, held
            return
        if len(held) > _ROW_BYTES:
            raise ValueError(f"a line of more than {_ROW_BYTES} bytes at byte {at}")


class _Record:
    """Lines for the CSV reader, which takes as many as a row has."""

    def __init__(self, raw: Bytes, start: int) -> None:
        self._lines = _lines(raw, start)
        self._begin, self._size, self._data = start, 0, list[bytes]()

    def __iter__(self) -> Iterator[str]:
        for at, line in self._lines:
            self._size += len(line)
            if self._size > _ROW_BYTES:
                raise ValueError(
                    f"a row of more than {_ROW_BYTES} bytes at byte {self._begin}: a quotation mark may be missing"
                )
            self._data.append(line)
            yield (line.removeprefix(codecs.BOM_UTF8) if at == 0 else line).decode("utf-8", "surrogateescape")

    def taken(self) -> tuple[int, bytes]:
        """Where the row began that was read last, and its bytes; the next one begins behind it."""
        begin, data = self._begin, b"".join(self._data)
        self._begin, self._size, self._data = begin + self._size, 0, []
        return begin, data


def csv_rows(raw: Bytes, start: int = 0) -> Iterator[Row]:
    """The rows of a CSV file with a header; comma, semicolon or tab, whichever the header has most of."""
    first = next(_lines(raw, 0), (0, b""))[1].decode("utf-8", "surrogateescape")
    if "\0" in first:
        raise ValueError("not UTF-8 (is it UTF-16? save it as UTF-8)")
    delimiter = max(_DELIMITERS, key=first.count)
    record = _Record(raw, 0)
    header = next(csv.reader(record, delimiter=delimiter), [])
    record.taken()
    names = [name.strip() for name in header]
    if start:
        record = _Record(raw, start)
    for cells in csv.reader(record, delimiter=delimiter):
        begin, data = record.taken()
        if not cells:
            continue
        doubtful = ""
        if len(cells) > len(names):
            doubtful = (
                f"{len(cells)} cells in a row, {len(names)} columns: put cells with a {delimiter!r} in quotation marks"
            )
        fields = dict.fromkeys(names) | dict(zip(names, (cell or None for cell in cells), strict=False))
        yield Row(begin, data, fields, doubtful=doubtful)


def json_rows(raw: Bytes, start: int = 0) -> Iterator[Row]:
    """The lines of a file of JSON objects."""
    for begin, line in _lines(raw, start):
        text = (line.removeprefix(codecs.BOM_UTF8) if begin == 0 else line).strip()
        if not text:
            continue
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Row(begin, line, {}, _valid(f"is not JSON: {error}")[:200])
            continue
        wrong = "" if isinstance(tree, dict) else f"holds a {type(tree).__name__}, not an object"
        yield Row(begin, line, {} if wrong else tree, wrong)


# -- listing


def _members(rows_of: Rows, raw: Bytes, file: SourceFile) -> Iterator[Member]:
    """One member a row, named by its path from the list's folder on, or in full where that lies elsewhere."""
    if not raw.size_bytes:
        raise ValueError("0 bytes")
    column = _column(rows_of, raw, file.image)
    asked = _Asked(file)
    rows = _sound(rows_of(raw, 0), raw.size_bytes)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        ask = pool.map if asked.remote else map
        while some := list(itertools.islice(rows, _IN_MEMORY)):
            yield from ask(lambda row: row if isinstance(row, Member) else asked.member(row, column), some)


def _sound(rows: Iterator[Row], size_bytes: int) -> Iterator[Row | Member]:
    """The rows, and what cannot be parted into rows as one refused member."""
    end = 0
    try:
        for row in rows:
            yield row
            end = row.offset + len(row.data)
    except (ValueError, csv.Error) as error:
        yield Member("", end, size_bytes - end, "unreadable_archive", _valid(f"from byte {end} on: {error}")[:200])


def _column(rows_of: Rows, raw: Bytes, wanted: str) -> str:
    """The column of paths, by the first row that can be read; "" if there is none."""
    first = next((row for row in _sound(rows_of(raw, 0), 0) if isinstance(row, Row) and not row.wrong), None)
    return "" if first is None else column_of(first.fields, wanted)


def column_of(fields: Iterable[str], wanted: str) -> str:
    """The column of paths: the one that `image:` names, in whatever capitals, or one that is usually called so.

    Raises:
        NoImages: there is none; says which columns there are.
    """
    names = [name for name in fields if name]
    lowered = {name.lower(): name for name in reversed(names)}
    usual = next((lowered[name] for name in _PATHS if name in lowered), None)
    if wanted in names or wanted.lower() in lowered:
        return wanted if wanted in names else lowered[wanted.lower()]
    if usual is not None and wanted == "image":
        return usual
    hint = f" (`image: {usual}` may be meant)" if usual else ""
    listed = ", ".join(f"`{name[:60]}`" for name in names[:12]) or "none"
    raise NoImages(_valid(f"no column `{wanted}` of paths{hint}; there are: {listed}"), meant=usual is not None)


class _Asked:
    """The files that a list names, as the file system shows them."""

    def __init__(self, file: SourceFile) -> None:
        base = posixpath.dirname(unescaped(file.uri))
        top = file.folder or base
        # A path may hold the sign by which URLs name a chain of file systems: `a::b`.
        self._fs, _ = file_system(f"{top.rstrip('/')}/".partition("::")[0])
        self.remote = not isinstance(self._fs, LocalFileSystem)
        self._protocol = top.partition("://")[0] if self.remote else ""
        self._top = self._without_protocol(top)
        # Names are short where the images lie below the list, on the same file system.
        beside = (
            base.partition("://")[0] == self._protocol if self.remote else "://" not in base.removeprefix("file://")
        )
        self._base = self._without_protocol(base) if beside else None
        self._kind = functools.lru_cache(10_000)(
            functools.partial(own.remote_kind, self._fs) if self.remote else own.kind_of
        )
        self._own = functools.lru_cache(10_000)(lambda folder: own.within(folder, kind=self._kind))

    def member(self, row: Row, column: str) -> Member:
        if row.wrong:
            return Member("", row.offset, len(row.data), "bad_metadata", row.wrong)
        path = row.fields.get(column)
        if path is None or path == "":
            return Member("", row.offset, len(row.data), "empty", "no path in this row")
        if not isinstance(path, str):
            return Member(
                "",
                row.offset,
                len(row.data),
                "bad_metadata",
                _valid(f"`{column}` holds a {type(path).__name__}, not a path"),
            )
        full = self._within(path)
        if full is None:
            where = escaped(self._whole(self._top)) or "/"
            detail = f"leads out of {where}, where the list's paths must stay (`folder:` of its source names another)"
            return Member(_valid(path[:_PATH]), row.offset, 0, "not_a_file", detail)
        inside = self._base is not None and full.startswith(f"{self._base}/")
        name = escaped(full.removeprefix(f"{self._base}/") if inside else self._whole(full))
        size_bytes, state, refused = self._looked_at(self._whole(full))
        if refused:
            return Member(name, row.offset, 0, "not_a_file", refused)
        return Member(name, row.offset, size_bytes, state=f"{state} {row.digest}")

    def _without_protocol(self, path: str) -> str:
        plain: str = self._fs._strip_protocol(path).rstrip("/")
        return plain.partition("://")[2] if "://" in plain else plain

    def _whole(self, path: str) -> str:
        return f"{self._protocol}://{path}" if self._protocol else path

    def _within(self, path: str) -> str | None:
        """The whole path, without `..` and protocol; None if it leads elsewhere, or cannot be one."""
        if "\0" in path or len(path) > _PATH or _LONE.search(path):
            return None
        if "\\" in path and "/" not in path:
            path = path.replace("\\", "/")  # as Windows writes it
        if not self.remote:
            path = path.removeprefix("file://")
        if "://" in path:
            if not self._protocol or not path.startswith(f"{self._protocol}://"):
                return None
            path = self._without_protocol(path)
        else:
            path = posixpath.join(self._top or "/", path)
        full = posixpath.normpath(path)
        return full if full.startswith(f"{self._top}/") and full != f"{self._top}/" else None

    def _looked_at(self, full: str) -> tuple[int, str, str]:
        """Size, state, and why this is no file that can be read."""
        try:
            if self.remote:
                info = self._fs.info(full)
                size, state = int(info.get("size") or 0), state_of(info)
                refused = "" if info["type"] == "file" else "a folder"
                folder = posixpath.dirname(str(self._fs._strip_protocol(full)))
            else:
                status = Path(full).stat()
                size, state = status.st_size, str(status.st_mtime_ns)
                folder = posixpath.dirname(os.path.realpath(full))
                refused = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
                refused = "" if stat.S_ISREG(status.st_mode) else refused
            if not refused and self._own(folder):
                refused = "lodeset made it, and never takes its own images for new ones"
        except FileNotFoundError:
            return 0, "", "no such file"
        except Exception as error:
            if isinstance(error, OSError) and not self.remote and error.errno in _NO_FILE:
                return 0, "", f"no such file: {error.strerror}"
            raise cannot_be_read(escaped(full), error) from error
        return size, state, refused


# -- reading


def _path(uri: str, member: str) -> str:
    """Where a member of a list lies."""
    return member if "://" in member or member.startswith("/") else posixpath.join(posixpath.dirname(uri), member)


def _read(rows_of: Rows, piece: Slice, max_bytes: int) -> Iterator[Sample]:
    """The images of these rows, and what the other columns say about them.

    Raises:
        LodesetError: the list, or a file that it names, is no longer the one that was listed.
    """
    with Bytes(piece.uri) as raw:
        rows: Iterator[Row] = iter(())
        column = "" if all(m.reason for m in piece.members) else _column(rows_of, raw, piece.image)
        for member in piece.members:
            place = (piece.uri, member.name, member.offset, member.size_bytes)
            if member.reason:
                yield Sample(*place, reason=member.reason, detail=member.detail)
                continue
            row = next(rows, None)
            if row is None or row.offset != member.offset:
                rows = rows_of(raw, member.offset)
                row = next(rows, None)
            if row is None or member.state.rpartition(" ")[2] != row.digest:
                raise LodesetError(f"{piece.uri} changed since it was listed, at byte {member.offset}: run again")
            fields: list[Mapping[str, Any]] = [partition_fields(_path(piece.uri, member.name))]
            wrong = row.doubtful
            if not wrong:
                try:
                    fields.append(plain({name: value for name, value in row.fields.items() if name and name != column}))
                except BadMetadata as error:
                    wrong = str(error)
            if wrong:
                yield Sample(
                    piece.uri, "", row.offset, len(row.data), reason="bad_metadata", detail=_valid(wrong)[:200]
                )
            with Bytes(_path(piece.uri, member.name)) as file:
                if file.size_bytes != member.size_bytes:
                    raise changed(file.uri, member.size_bytes, file.size_bytes)
                data = file.read_at(0, needed(member, max_bytes))
            yield sample_of(place, data, fields, max_bytes)


def _check(piece: Slice) -> None:
    for member in piece.members:
        if member.state:
            check_state(_path(piece.uri, member.name), member.state.rpartition(" ")[0], member.size_bytes)


class Named:
    """The files that a list names, opened one by one."""

    def __init__(self, uri: str, alive: Alive = lambda: None) -> None:
        self._uri = uri

    def read(self, member: str, offset: int, size_bytes: int, first: int) -> bytes:
        with Bytes(_path(self._uri, member)) as file:
            return file.read_at(0, first)

    def close(self) -> None: ...


def list_of(kind: str, suffixes: tuple[str, ...], rows_of: Rows) -> Container:
    """A kind of list, by what reads its rows."""
    return Container(
        kind=kind,
        suffixes=suffixes,
        members=functools.partial(_members, rows_of),
        opened=Named,
        read=functools.partial(_read, rows_of),
        check=_check,
        sidecars=False,
        image_column=True,
        elsewhere=True,
        expansion=_BYTES_A_BYTE,
    )


CSV = list_of("csv", (".csv",), csv_rows)
JSON_LINES = list_of("jsonl", (".jsonl", ".ndjson"), json_rows)
