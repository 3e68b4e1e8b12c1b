"""What is known of pairs of images, whatever else the pool holds: taken over from the run before, made in parts otherwise."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.copies import views
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context
from lodeset.pipeline.dag.store import Artifact, File, Part
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.tables.kept import fixed, rows_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Kind:
    """A table of pairs; its parts hold up to `pairs` of them, each of which takes a core `seconds`. `by` is the detail that says by
    what they were made.
    """

    stage: str
    table: str
    by: str
    pairs: int
    seconds: float


@dataclass(frozen=True)
class Pairs:
    """Pairs of images by node, and the view in which each was found; makes one part."""

    key: str
    a: Ints
    b: Ints
    view: NDArray[np.int16]


@dataclass(frozen=True)
class Known:
    """One row for each pair that was asked for (what was made of it), the files that hold them, parts in all and parts made."""

    kind: Kind
    basis: str
    table: pa.Table
    files: tuple[File, ...]
    parts: int
    parts_made: int


def known(
    context: Context,
    kind: Kind,
    basis: str,
    ids: Sequence[str],
    pairs: tuple[Ints, Ints, NDArray[np.int16]],
    worker: Callable[[], Callable[[Pairs], Part]],
) -> Known:
    """What a table of `kind` says of these pairs (a, b, view) of distinct nodes of `ids` (sorted image_ids).

    Pairs that lie together are made together. `basis` is all that a row depends on besides the two images and the view.
    """
    names = np.array(ids, "S32")
    a, b, view = pairs
    wanted = _keys(len(ids), a, b, view)
    order = np.argsort(wanted)
    left = np.ones(len(wanted), bool)
    pieces: list[pa.Table] = []
    places: list[Ints] = [np.zeros(0, np.int64)]

    def take(file: File) -> bool:
        """Whether it holds any of what is left."""
        table = context.store.table([file])
        first, second = (rows_of(fixed(table[name]), names) for name in ("image_id_a", "image_id_b"))
        there = (first >= 0) & (second >= 0)
        held = np.where(there, _keys(len(ids), first, second, table["view"].to_numpy()), -1)
        at = order[np.searchsorted(wanted, held, sorter=order).clip(max=len(order) - 1)]
        rows = np.flatnonzero((wanted[at] == held) & left[at])
        left[at[rows]] = False
        pieces.append(table.drop_columns(["image_id_a", "image_id_b", "view"]).take(pa.array(rows)))
        places.append(at[rows])
        return len(rows) > 0

    files = [file for file in _earlier(context.previous, kind, basis) if left.any() and take(file)]
    missing = np.flatnonzero(left)
    work = []
    for start in range(0, len(missing), kind.pairs):
        rows = missing[start : start + kind.pairs]
        some = a[rows], b[rows], view[rows]
        columns = (hashlib.sha256(x.tobytes()).hexdigest() for x in (names[some[0]], names[some[1]], some[2]))
        key = digest(kind.stage, basis, *columns)
        work.append((key, Pairs(key, *some), len(rows)))
    make = functools.partial(
        map_with_state,
        worker,
        cpus=context.cpus,
        address=context.ray_address,
        seconds=lambda some: kind.seconds * len(some.a),
    )
    parts, new = made(context, kind.stage, work, make, unit="pairs")
    added = [part.files[kind.table] for part in parts]
    for file in added:
        take(file)
    assert not left.any(), f"{left.sum()} pairs are missing from {kind.table}"
    table = pa.concat_tables(pieces).take(pa.array(np.argsort(np.concatenate(places)))) if pieces else pa.table({})
    return Known(kind, basis, table, (*files, *added), len(files) + len(parts), len(new))


def measured_before(
    previous: Artifact | None, kinds: Sequence[Kind], now: Sequence[Known]
) -> list[tuple[Kind, str, tuple[File, ...]]]:
    """Of each kind, by what it was made and its files: as of `now`, or, where nothing was asked for, as of the run before."""
    asked = {known.kind: (known.basis, known.files) for known in now}
    if previous is not None:
        before = {k: (previous.details[k.by], previous.tables[k.table]) for k in kinds if k.by in previous.details}
        asked = {**before, **asked}
    return [(kind, basis, files) for kind, (basis, files) in asked.items()]


def columns_of(ids: pa.Array, pairs: Pairs) -> Mapping[str, pa.Array]:
    """The columns that every table of pairs has."""
    return {
        "image_id_a": ids.take(pa.array(pairs.a)),
        "image_id_b": ids.take(pa.array(pairs.b)),
        "view": pa.array(pairs.view, pa.int16()),
    }


def lists(rows: Floats) -> pa.Array:
    """The rows of a matrix as lists."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1)))


def matrix(table: pa.Table, name: str, width: int) -> Floats:
    """Lists of one length as rows."""
    if not table.num_rows:
        return np.zeros((0, width), np.float32)
    return np.asarray(table[name].combine_chunks().flatten().to_numpy().reshape(-1, width))


def _earlier(previous: Artifact | None, kind: Kind, basis: str) -> tuple[File, ...]:
    if previous is None or previous.details.get(kind.by) != basis:
        return ()
    return previous.tables[kind.table]


def _keys(count: int, a: Ints, b: Ints, view: NDArray[np.int16]) -> Ints:
    return np.asarray((a * count + b) * len(views.VIEWS) + view)
