"""Any WebDataset as something to train on: its tars are read before the first step, and an index of each is kept.

A stream could only be shuffled through a buffer, split over workers by whole shards, and resumed roughly. With an index, a foreign
WebDataset is trained on like lodeset's own shards: exact shuffles, exact resume, any number of workers. What it costs is reading all
tars, a few at a time, before the first step (headers, then images); a run that goes on does not repeat it.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import records
from pipeline.algorithms.images import EXTENSIONS, image_id
from pipeline.config import Ingest, Source
from pipeline.dag.fingerprint import digest
from pipeline.errors import LodesetError
from pipeline.sources.files import Bytes
from pipeline.sources.listing import SourceFile, expand
from pipeline.sources.members import Member
from pipeline.sources.slices import members_of
from training.index import Shards, open_index

log = logging.getLogger(__name__)

INDEX = "index.parquet"
AT_ONCE = 8  # tars that are read at the same time
MOST_BYTES = Ingest().max_bytes
IMAGES = {f".{extension}" for extension in EXTENSIONS.values()} | {".jpeg", ".tiff"}
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def shards_of(urls: Sequence[str], folder: Path) -> Shards:
    """What lies at `urls`: `index.parquet` files that lodeset wrote, or tars (paths, globs, folders, fsspec URLs, `{000..099}`).

    Indexes of tars go to `folder`, one each, and are made anew where a tar has changed.

    Raises:
        LodesetError: nothing is there, it is no tar, or no tar holds an image.
    """
    told = [one for url in urls for one in braces_expanded(url)]
    if told and all(url.endswith(INDEX) for url in told):
        open_index(told)  # says now what is wrong with it
        return Shards(index=tuple(told))
    files = expand([Source(uri=url) for url in told], "shards")
    other = next((file.uri for file in files if file.kind != "tar"), None)
    if other is not None:
        raise LodesetError(f"{other} is no tar: give WebDataset tars, or one `{INDEX}` that lodeset wrote")
    with ThreadPoolExecutor(AT_ONCE) as readers:
        found = list(readers.map(lambda file: _indexed(file, folder), files))
    whole = tuple(path for path, images in found if images)
    if not whole:
        raise LodesetError(f"{len(files)} tars hold no image: looked for {', '.join(sorted(IMAGES))}")
    return Shards(index=whole)


def braces_expanded(url: str) -> Iterator[str]:
    """`a-{08..11}.tar` and `{train,val}.tar` as WebDataset means them: numbers keep the zeros that the first one has.

    Raises:
        LodesetError: a range that holds nothing.
    """
    match = BRACES.search(url)
    if match is None:
        yield url
        return
    if match.group(3) is not None:
        parts = match.group(3).split(",")
    else:
        first, last = match.group(1), match.group(2)
        if int(first) > int(last):
            raise LodesetError(f"{url}: {first} to {last} holds nothing: write the smaller number first")
        parts = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    for part in parts:
        yield from braces_expanded(url[: match.start()] + part + url[match.end() :])


def _indexed(file: SourceFile, folder: Path) -> tuple[str, int]:
    """The index of a tar, made unless it is there, and how many images it lists."""
    path = folder / f"{digest(file.uri, file.size_bytes, file.state)[:32]}.parquet"
    if not path.is_file():
        left_out: list[Member] = []
        rows = [
            {"image_id": name, "shard": file.uri, "offset": member.offset, "size_bytes": member.size_bytes}
            for name, member in _images(file, left_out)
        ]
        if left_out:
            first = left_out[0]
            log.warning(
                "%s: %d members cannot be read, the first at byte %d: %s %s",
                *(file.uri, len(left_out), first.offset, first.reason, first.detail),
            )
        table = pa.Table.from_pylist(rows, records.SHARDS)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        pq.write_table(table, unfinished)
        os.replace(unfinished, path)
    return str(path), pq.read_metadata(path).num_rows


def _images(file: SourceFile, left_out: list[Member]) -> Iterator[tuple[str, Member]]:
    """The images that a tar holds, by their ids; a broken one counts as far as it can be read. `left_out` gets what cannot."""
    members = members_of(file)
    if len(members) == 1 and members[0].reason == "unreadable_archive":
        raise LodesetError(f"{file.uri} is no tar that can be read: {members[0].detail}")
    with Bytes(file.uri) as raw:
        for member in members:
            if member.reason:
                left_out.append(member)
            elif member.extension in IMAGES and member.size_bytes > MOST_BYTES:
                left_out.append(replace(member, reason="too_large", detail=f"{member.size_bytes} bytes"))
            elif member.extension in IMAGES and member.size_bytes:
                yield image_id(raw.read_at(member.offset, member.size_bytes)), member
