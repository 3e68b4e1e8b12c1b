"""What each source of a set gave. One that gave nothing, or whose larger part cannot be read, is a mistake more often than not."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from lodeset.pipeline.dag.stage import Outcome
from lodeset.pipeline.dag.store import File, Part, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.sources.containers import LOOSE
from lodeset.pipeline.sources.listing import SourceFile
from lodeset.pipeline.tables import records

# Reasons of files that hold others: they stand for all the images in them.
_ARCHIVES = ("archive", "unreadable_archive")
WRONG, _NONE = "wrong_image_column", "no_image_column"
_MOST = 0.5  # of a source's bytes, that may lie in archives that cannot be read
_NAMED = 3


@dataclass(frozen=True)
class Given:
    """The parts of a set with where they come from.

    Attributes:
        of_file: the parts of each file that is no loose one, in the order of the files.
        loose: the parts of loose files, with the root that each lies below.
    """

    of_file: Sequence[tuple[SourceFile, Part]]
    loose: Sequence[tuple[str, Part]]


def checked(
    store: Store, set_: str, files: Sequence[SourceFile], given: Given, rejects: Sequence[File], stop: bool, drawn: bool
) -> list[str]:
    """What is to be told of the set's sources.

    Args:
        stop: whether a source that does not say what to do stops the run.
        drawn: whether a limit left images out, so that a source may have none by chance.

    Raises:
        LodesetError: a source gave no image, its images lie in another column, or most of it cannot be read.
    """
    stops = {file.source: stop if file.on_unreadable is None else file.on_unreadable == "stop" for file in files}
    lost = _lost(store, rejects)
    source_of = {file.uri: file.source for file in files} if lost.num_rows else {}
    rows = [row | {"source": source_of[row["uri"]]} for row in lost.to_pylist()]
    for row in rows:
        if row["reason"] == WRONG and stops[row["source"]]:
            raise LodesetError(
                f"{shown(row['uri'])}: {row['detail']}. Name the column (`image:`), leave the file out (`exclude:`), "
                "or go on without it (`on_unreadable: count`)"
            )
    unread = [row for row in rows if row["reason"] in _ARCHIVES]
    size = collections.Counter[str]()
    for file in files:
        size[file.source] += file.size_bytes
    missing = collections.Counter[str]()
    for row in unread:
        missing[row["source"]] += row["size_bytes"]
    for source in stops:
        if stops[source] and missing[source] > _MOST * size[source]:
            example = next(row for row in unread if row["source"] == source)
            raise LodesetError(
                f"`{set_}`: {missing[source]:,} of the {size[source]:,} bytes of {shown(source)} lie in archives that cannot be read, "
                f"e.g. {_named(example)}. Mend them, leave them out (`exclude:`), or go on without them (`on_unreadable: count`)"
            )
    empty = [] if drawn else _without_images(store, files, given)
    for source in empty:
        if stops[source]:
            raise LodesetError(
                f"`{set_}`: {shown(source)} has no readable image{_why(store, files, source, rejects)}: correct it, take it out, or go "
                "on without it (`on_unreadable: count`)"
            )
    told = [f"{shown(source)} has no readable image" for source in empty]
    for found, one, many in (
        (unread, "1 archive cannot be read, or only a part of it", "archives cannot be read, or only parts of them"),
        (
            [r for r in rows if r["reason"] == WRONG],
            "1 Parquet file or list keeps its images in another column than `image:` names",
            "Parquet files or lists keep their images in other columns than `image:` names",
        ),
        (
            [r for r in rows if r["reason"] == _NONE],
            "1 Parquet file or list has no column of images",
            "Parquet files or lists have no column of images",
        ),
    ):
        if len(found) == 1:
            told.append(f"{one}: {_named(found[0])}")
        elif found:
            told.append(f"{len(found):,} {many}, e.g. {_named(found[0])}")
    return told


def nothing_in(set_: str, store: Store, outcome: Outcome) -> str:
    """Nothing below can work without images, and a reference set of none would protect nothing."""
    found = ", ".join(f"{reason} {count}" for reason, count in outcome.rows.dropped.items()) or "the archives are empty"
    example = ""
    for row in store.table(outcome.tables["rejects"], None, records.REJECTS).slice(0, 1).to_pylist():
        example = f", e.g. {row['uri']} {row['member']}".rstrip() + f": {row['detail']}"
    return (
        f"`{set_}` has no readable image in the {outcome.rows.taken} files that were found ({found}{example}): "
        "correct its source in the configuration, or take the set out"
    )


def _lost(store: Store, rejects: Sequence[File]) -> pa.Table:
    """The rejects that stand for more than one image."""
    reasons = pa.array([*_ARCHIVES, WRONG, _NONE], pa.string())
    columns = ["uri", "member", "size_bytes", "reason", "detail"]
    found = [records.REJECTS.empty_table().select(columns)]
    for file in rejects:
        table = store.table([file], columns, records.REJECTS)
        found.append(table.filter(pc.is_in(table["reason"], reasons)))
    return pa.concat_tables(found)


def _without_images(store: Store, files: Sequence[SourceFile], given: Given) -> list[str]:
    """The sources that none of the images comes from, in the order of the configuration."""
    left = dict.fromkeys(file.source for file in files)
    for file, part in given.of_file:
        if part.files["locations"].rows:
            left.pop(file.source, None)
    below: dict[str, set[str]] = {}
    for file in files:
        if file.kind == LOOSE:
            below.setdefault(file.root, set()).add(file.source)
    sources: Mapping[str, str] = {}
    for root, part in given.loose:
        possible = below[root] & left.keys()
        if not possible or not part.files["locations"].rows:
            continue
        if len(below[root]) > 1:  # files of several sources in one folder: only their paths tell
            sources = sources or {file.uri: file.source for file in files}
            uris = store.table([part.files["locations"]], ["uri"])["uri"].unique().to_pylist()
            possible = {sources[uri] for uri in uris}
        for source in possible:
            left.pop(source, None)
    return list(left)


def _why(store: Store, files: Sequence[SourceFile], source: str, rejects: Sequence[File]) -> str:
    uris = pa.array([file.uri for file in files if file.source == source], pa.string())
    table = store.table(rejects, ["uri", "member", "reason", "detail"], records.REJECTS)
    rows = table.filter(pc.is_in(table["uri"], uris)).to_pylist()
    if not rows:
        return f" in its {len(uris)} files"
    counts = collections.Counter(row["reason"] for row in rows).most_common(_NAMED)
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts)
    return f" in its {len(uris)} files ({reasons}, e.g. {_named(rows[0])})"


def _named(row: Mapping[str, str]) -> str:
    return f"{shown(' '.join(filter(None, (row['uri'], row['member']))))}: {row['detail']}"
