"""Train on any WebDataset or folder of images: they are read before the first step, and an index is stored for each
tar, and for the loose files of each folder.

A stream could only be shuffled through a buffer, split over workers by whole shards, and resumed approximately. With an
index, other images are trained on like lodeset's own shards: exact shuffles, exact resume, any number of workers. The
price is reading all of them, a few files at a time, before the first step; a resumed run does not repeat it.

Images are recognized by their bytes, not by their names.
"""

import io
import itertools
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lodeset.pipeline.algorithms.images.decoding import FORMATS, Unreadable, decode, image_id
from lodeset.pipeline.algorithms.images.formats import optional_format
from lodeset.pipeline.config import Ingest, Source
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.sources.containers import LOOSE
from lodeset.pipeline.sources.files import Bytes
from lodeset.pipeline.sources.listing import SourceFile, expand
from lodeset.pipeline.sources.members import Member
from lodeset.pipeline.sources.slices import members_of
from lodeset.pipeline.tables import records
from lodeset.training.index import Shards, open_index

log = logging.getLogger(__name__)

INDEX = "index.parquet"
INSTEAD = f"a folder of images, or one `{INDEX}` that lodeset wrote"
VERSION = 3  # of the rules for recognizing images
AT_ONCE = 8  # number of tars that are read at the same time
MOST_BYTES = Ingest().max_bytes
BEGINNING = 32  # bytes that show whether a file may be an image: others (videos, arrays) are not read as a whole
BEGINS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM|RIFF....WEBP|II[*+]\x00|MM\x00[*+]|P[1-7]\s|\x00\x00\x00\x0c(?:jP  |JXL )|\xff\x4f\xff\x51|\xff\x0a"
    rb"|....ftyp(?:avi|mif|msf|hei|hev)",
    re.DOTALL,
)
MOST_NAMES = 1_000_000  # maximum that a range may stand for
MOST_NAMED = 3  # maximum number of files that a message lists
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def shards_of(urls: Sequence[str], folder: Path) -> Shards:
    """The shards at `urls`: `index.parquet` files that lodeset wrote, or tars and images (paths, globs, folders, fsspec
    URLs, `{000..099}`).

    Indexes are written to `folder`, one per tar and one for all loose images of a folder, and rewritten if the tar or
    folder has changed.

    Raises:
        LodesetError: there is nothing at `urls`, or no image.
    """
    expanded = list(itertools.islice((name for url in urls for name in braces_expanded(url)), MOST_NAMES + 1))
    if len(expanded) > MOST_NAMES:
        raise LodesetError(f"{shown(urls[0])} stands for more than {MOST_NAMES:,} files: give a glob (`*`), or fewer")
    if expanded and all(url.endswith(INDEX) for url in expanded):
        open_index(expanded)  # reports errors now
        return Shards(index=tuple(expanded))
    files = expand([Source(uri=url) for url in expanded], "shards")
    table = next((file.uri for file in files if file.kind == "parquet"), None)
    if table is not None:
        raise LodesetError(f"{table} is neither a tar nor an image: give WebDataset tars, {INSTEAD}")
    tars = [file for file in files if file.kind == "tar"]
    others = [file.uri for file in files if file.kind not in ("tar", LOOSE)]
    if len(others) == len(files):
        raise LodesetError(f"{others[0]} is no plain tar and no image: give WebDataset tars, {INSTEAD}")
    if others:
        log.warning("left out, because they are no plain tars: %s", ", ".join(others[:MOST_NAMED]))
    loose: dict[str, list[SourceFile]] = {}
    for file in files:
        if file.kind == LOOSE and not file.refused:
            loose.setdefault(file.root, []).append(file)
    with ThreadPoolExecutor(AT_ONCE) as readers:
        tried = list(readers.map(lambda file: _tried(file, folder), tars))
        indexed = [result for result in tried if not isinstance(result, NoTar)]
        indexed += [_indexed_loose(inside, folder, readers) for inside in loose.values()]
    whole = tuple(path for path, images in indexed if images)
    broken = [result for result in tried if isinstance(result, NoTar)]
    if broken and not whole:
        raise broken[0]
    for failure in broken:
        log.warning("left out: %s", failure)
    if not whole:
        raise LodesetError(
            f"{len(files)} files hold no image, the first of them is {files[0].uri}: give WebDataset tars, {INSTEAD}"
        )
    return Shards(index=whole)


class NoTar(LodesetError):
    """A file with the name of a tar of which nothing can be read."""


def _tried(file: SourceFile, folder: Path) -> tuple[str, int] | NoTar:
    try:
        return _indexed(file, folder)
    except NoTar as error:
        return error


def braces_expanded(url: str) -> Iterator[str]:
    """Expand `a-{08..11}.tar` and `{train,val}.tar` as WebDataset does: numbers keep the leading zeros of the first
    one.

    Raises:
        LodesetError: a range is empty.
    """
    match = BRACES.search(url)
    if match is None:
        yield url
        return
    if match.group(3) is not None:
        parts = match.group(3).split(",")
    else:
        first, last = match.group(1), match.group(2)
        if max(len(first), len(last)) > 18 or int(last) - int(first) >= MOST_NAMES:
            raise LodesetError(
                f"{shown(url)}: more than {MOST_NAMES:,} files between {first[:20]} and {last[:20]}: give a glob "
                "(`*`), or fewer"
            )
        if int(first) > int(last):
            raise LodesetError(f"{url}: the range {first} to {last} is empty: write the smaller number first")
        parts = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    for part in parts:
        yield from braces_expanded(url[: match.start()] + part + url[match.end() :])


def _indexed(file: SourceFile, folder: Path) -> tuple[str, int]:
    """The index of a tar, written unless it exists, and the number of images that it lists."""

    def rows() -> list[dict[str, Any]]:
        left_out: list[Member] = []
        images = [
            {"image_id": name, "shard": file.uri, "offset": member.offset, "size_bytes": member.size_bytes}
            for name, member in _images(file, left_out)
        ]
        if left_out:
            first = left_out[0]
            log.warning(
                "%s: %d members cannot be read, the first at byte %d: %s %s",
                *(file.uri, len(left_out), first.offset, first.reason, first.detail),
            )
        return images

    return _kept(folder, [file], rows)


def _indexed_loose(files: Sequence[SourceFile], folder: Path, readers: ThreadPoolExecutor) -> tuple[str, int]:
    """The index of a folder's loose files, written unless it exists, and the number of images that it lists."""

    def rows() -> list[dict[str, Any]]:
        ids = readers.map(_id_of, files)
        return [
            {"image_id": name, "shard": file.uri, "offset": 0, "size_bytes": file.size_bytes}
            for file, name in zip(files, ids, strict=True)
            if name is not None
        ]

    return _kept(folder, files, rows)


def _kept(folder: Path, files: Sequence[SourceFile], rows: Callable[[], list[dict[str, Any]]]) -> tuple[str, int]:
    """The index of the state of `files` when they were listed."""
    state = [part for file in files for part in (file.uri, file.size_bytes, file.state)]
    path = folder / f"{digest(VERSION, *state)[:32]}.parquet"
    if not path.is_file():
        table = pa.Table.from_pylist(rows(), records.SHARDS)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        pq.write_table(table, unfinished)
        os.replace(unfinished, path)
    return str(path), pq.read_metadata(path).num_rows


def _id_of(file: SourceFile) -> str | None:
    """The image_id of a file if it is an image."""
    if not 0 < file.size_bytes <= MOST_BYTES or Member(file.relative, 0, file.size_bytes).is_sidecar:
        return None
    with Bytes(file.uri) as raw:
        if not BEGINS.match(raw.read_at(0, min(BEGINNING, file.size_bytes))):
            return None
        data = raw.read_at(0, file.size_bytes)
    return image_id(data) if _opens(data) else None


def _opens(data: bytes) -> bool:
    """Whether these bytes are an image: by their header, or otherwise by decoding them as a run would."""
    if optional_format(data) is None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Image.open(io.BytesIO(data), formats=FORMATS).close()
            return True
        except Exception:  # codecs raise arbitrary errors
            pass
    try:
        decode(data)
    except (Unreadable, MemoryError):
        return False
    return True


def _images(file: SourceFile, left_out: list[Member]) -> Iterator[tuple[str, Member]]:
    """The images of a tar, by their ids; a damaged tar counts as far as it can be read. `left_out` receives the
    unreadable members.
    """
    members = members_of(file)
    if len(members) == 1 and members[0].reason == "unreadable_archive":
        raise NoTar(f"{file.uri} cannot be read as a tar: {members[0].detail}")
    with Bytes(file.uri) as raw:
        for member in members:
            if member.reason:
                left_out.append(member)
                continue
            if not member.size_bytes or member.is_sidecar:
                continue
            if not BEGINS.match(raw.read_at(member.offset, min(BEGINNING, member.size_bytes))):
                continue
            if member.size_bytes > MOST_BYTES:
                left_out.append(replace(member, reason="too_large", detail=f"{member.size_bytes} bytes"))
                continue
            data = raw.read_at(member.offset, member.size_bytes)
            if _opens(data):
                yield image_id(data), member
