"""Lists of images that somebody made by hand: the section `by_hand`, and the files of image_ids that a configuration names."""

from __future__ import annotations

import csv
import hashlib
import io
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from lodeset.pipeline.algorithms.images.decoding import ID_HEX_DIGITS
from lodeset.pipeline.dag.files import reaching
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.remote.file_system import opened
from lodeset.pipeline.shown import shown
from lodeset.pipeline.strict import Strict

BY_HAND = "by_hand"  # the reason, and the mode of selection
COLUMN = "image_id"
_ID = re.compile(rf"[0-9a-f]{{{ID_HEX_DIGITS}}}")
_KINDS = "a text file with one image_id a line, or a .csv or .parquet file with a column image_id"

ListFile = Annotated[str, Field(min_length=1)]


class ByHand(Strict):
    """Lists of image_ids of the pool: text files with one a line (# comments), or .csv or .parquet files with a column `image_id`."""

    drop: tuple[ListFile, ...] = Field(
        (), description="paths or fsspec URLs of lists of images to drop, before dedup looks for copies"
    )
    keep: tuple[ListFile, ...] = Field(
        (),
        description="lists of images to keep: no filter drops them, and dedup keeps each of them beside its copies; blocked_domains, "
        "blocked_urls and reference sets come first all the same",
    )


@dataclass(frozen=True)
class IdList:
    """The distinct image_ids of one file, sorted; `name` is that of the file, without its folder."""

    key: str  # of the configuration, e.g. by_hand.drop
    place: str
    ids: tuple[str, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return shown(posixpath.basename(re.sub(r"[?#].*", "", self.place)) or self.place)


@dataclass(frozen=True)
class Lists:
    """What the section `by_hand` names."""

    drop: tuple[IdList, ...] = ()
    keep: tuple[IdList, ...] = ()

    @property
    def all(self) -> tuple[IdList, ...]:
        return (*self.drop, *self.keep)

    @property
    def identity(self) -> dict[str, Any]:
        """What of them enters the fingerprint of `filter`, by key."""
        return {of[0].key: identity_of(of) for of in (self.drop, self.keep) if of}


def identity_of(lists: Sequence[IdList]) -> Mapping[str, Any]:
    """What lists of ids are: how many distinct ones they hold, and which; the names and places of the files do not matter."""
    ids = sorted(union(lists))
    return {"ids": len(ids), "digest": hashlib.sha256("\n".join(ids).encode()).hexdigest()}


def union(lists: Iterable[IdList]) -> frozenset[str]:
    return frozenset().union(*(one.ids for one in lists))


def lists_of(config: ByHand | None) -> Lists:
    """Reads the lists of the section.

    Raises:
        LodesetError: a file is missing or cannot be read.
        ConfigError: an entry that is no image_id, or an image that is to be dropped and kept.
    """
    if config is None:
        return Lists()
    lists = Lists(
        tuple(read_list(place, "by_hand.drop") for place in config.drop),
        tuple(read_list(place, "by_hand.keep") for place in config.keep),
    )
    both = sorted(union(lists.drop) & union(lists.keep))
    if both:
        first, more = both[0], f", and so are {len(both) - 1:,} more" if len(both) > 1 else ""
        drop, keep = (next(one for one in of if first in one.ids) for of in (lists.drop, lists.keep))
        raise ConfigError(
            f"image {first} is in by_hand.drop ({shown(drop.place)}) and in by_hand.keep ({shown(keep.place)}){more}: remove it from "
            "one of the two"
        )
    return lists


def read_list(place: str, key: str) -> IdList:
    """Reads the list of image_ids that a key of the configuration names.

    Raises:
        LodesetError: the file is missing or cannot be read.
        ConfigError: an entry that is no image_id.
    """
    try:
        with reaching(f"{key}: {shown(place)}"), opened(place) as file:
            data = file.read()
    except FileNotFoundError:
        raise LodesetError(f"{key}: no file {shown(place)}: give {_KINDS}") from None
    except (OSError, ValueError) as error:
        raise LodesetError(f"{key}: {shown(place)} cannot be read ({shown(error)}): give {_KINDS}") from error
    kind = posixpath.splitext(re.sub(r"[?#].*", "", place))[1].lower()
    found: set[str] = set()
    for where, entry in _entries(data, kind, f"{key}: {shown(place)}"):
        if not _ID.fullmatch(entry):
            lowered = ": write it in lower case" if _ID.fullmatch(entry.lower()) else ""
            raise ConfigError(
                f"{key}: {shown(place)}:{where}: {shown(entry[:80])!r} is not an image_id ({ID_HEX_DIGITS} lower-case hex digits, as "
                f"`lodeset table CONFIG images` shows them){lowered}"
            )
        found.add(entry)
    return IdList(key, place, tuple(sorted(found)))


def _entries(data: bytes, kind: str, what: str) -> Iterator[tuple[str, str]]:
    """(where it stands in the file, entry)."""
    if kind == ".parquet":
        yield from _of_parquet(data, what)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LodesetError(f"{what} is not a text file ({error}): give {_KINDS}") from None
    if kind == ".csv":
        yield from _of_csv(text, what)
        return
    for number, line in enumerate(text.splitlines(), 1):
        entry = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if entry:
            yield str(number), entry


def _of_csv(text: str, what: str) -> Iterator[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if COLUMN not in (rows.fieldnames or ()):
            raise ConfigError(_no_column(what, rows.fieldnames or ()))
        for row in rows:
            yield str(rows.line_num), (row[COLUMN] or "").strip()
    except csv.Error as error:
        raise LodesetError(f"{what}:{rows.line_num} cannot be read as CSV ({error}): give {_KINDS}") from error


def _of_parquet(data: bytes, what: str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        if COLUMN not in names:
            raise ConfigError(_no_column(what, names))
        values = file.read([COLUMN])[COLUMN].cast(pa.string()).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise LodesetError(f"{what} cannot be read as Parquet ({shown(str(error)[:200])}): give {_KINDS}") from error
    for row, value in enumerate(values):
        yield f"row {row}", "" if value is None else value


def _no_column(what: str, names: Sequence[str]) -> str:
    there = ", ".join(map(shown, names[:10])) or "none"
    return f"{what} has no column {COLUMN} (its columns: {there}): rename the column that holds the image_ids"
