"""The third step of near-duplicates: pairs that thumbnails leave in doubt are compared on their full images (Ray).

A part holds what was measured of some pairs, which depends on nothing but their bytes: another threshold, and a grown pool, take
it over. Images are read in the order in which they lie, and described once for all pairs of a part.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import reverse_cuthill_mckee

from lodeset.pipeline.algorithms.copies import closeup, details, keypoints, shipped
from lodeset.pipeline.algorithms.copies.closeup import Overlap
from lodeset.pipeline.algorithms.copies.details import Drawing
from lodeset.pipeline.algorithms.copies.keypoints import Described
from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context
from lodeset.pipeline.dag.store import Artifact, Part, Store
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.stages.dedup.pairwise import Kind, Known, Pairs, columns_of, known, lists, matrix
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.images import places_of

VERSION = 2
# A part may hold 512 images in memory, about 1 MB each with their key points.
CLOSEUPS = Kind("dedup_closeups", "closeups", "closeups_by", pairs=256, seconds=0.03)
AT_ONCE = 256

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Looks:
    """What close looks at P pairs found."""

    points: Ints  # key points that agree; 0 where too few do, and the rest says nothing
    score: Floats  # log-odds of being copies
    details: (
        Floats  # log-odds of showing the same down to their details; NaN where that was not, or cannot be, compared
    )
    maps: Floats  # [P, 6], as in `edges`
    known: Known


def look(context: Context, artifacts: Sequence[Artifact], ids: Sequence[str], a: Ints, b: Ints) -> Looks:
    """Looks at pairs a < b of nodes of `ids` (sorted image_ids), whose bytes lie where `artifacts` of images say.

    Raises:
        LodesetError: an image's bytes are no longer those that were ingested.
    """
    order = _gathered(a, b)
    places = _places(context.store, artifacts, [ids[node] for node in np.union1d(a, b).tolist()])
    worker = functools.partial(_looker, context.store, ids, places, context.runtime.max_pixels)
    pairs = a[order], b[order], np.zeros(len(a), np.int16)
    # What pixels are made of bytes is for ingest of some version to say.
    makers = sorted({(artifact.stage, artifact.version) for artifact in artifacts})
    basis = digest(VERSION, makers, shipped.identity(shipped.CLOSEUP))
    found = known(context, CLOSEUPS, basis, ids, pairs, worker)
    back = np.argsort(order)
    features = matrix(found.table, "features", len(closeup.FEATURES))[back]
    points = found.table["points"].to_numpy()[back].astype(np.int64) if len(a) else np.zeros(0, np.int64)
    return Looks(
        points, closeup.score(features), _details(found.table)[back], matrix(found.table, "map", 6)[back], found
    )


def _details(table: pa.Table) -> Floats:
    """The log-odds [P] of `closeups`, NaN where there is none."""
    found = np.full(table.num_rows, np.nan, np.float32)
    if table.num_rows:
        there = np.flatnonzero(table["details"].is_valid().to_numpy())
        measured = matrix(table.take(pa.array(there)), "details", len(details.FEATURES))
        found[there] = details.score(measured) if len(there) else []
    return found


def _gathered(a: Ints, b: Ints) -> Ints:
    """An order of pairs in which those that share images lie together (reverse Cuthill-McKee).

    Parts of 22,799 pairs of 4,590 photographs describe 13,400 images so, and 23,400 when pairs are sorted by node.
    """
    nodes, ends = np.unique(np.concatenate([a, b]), return_inverse=True)
    first, second = ends[: len(a)], ends[len(a) :]
    graph = coo_matrix((np.ones(len(a), np.int8), (first, second)), shape=(len(nodes), len(nodes))).tocsr()
    rank = np.empty(len(nodes), np.int64)
    rank[reverse_cuthill_mckee(graph + graph.T, symmetric_mode=True)] = np.arange(len(nodes))
    one, other = rank[first], rank[second]
    return np.asarray(np.lexsort((np.maximum(one, other), np.minimum(one, other))))


def _places(store: Store, artifacts: Sequence[Artifact], wanted: Sequence[str]) -> dict[str, Location]:
    """Where each of these images lies: its first place."""
    left, found = set(wanted), dict[str, Location]()
    for artifact in artifacts:
        for images, locations in zip(artifact.tables["images"], artifact.tables["locations"], strict=True):
            if not left:
                return found
            table = places_of(store, images, locations)
            table = table.filter(pc.is_in(table["image_id"], pa.array(wanted)))
            for image_id, uri, member, offset, size in zip(
                *(table[name].to_pylist() for name in ("image_id", "uri", "member", "offset", "size_bytes")),
                strict=True,
            ):
                if image_id in left:
                    found[image_id] = Location(image_id, uri, member, offset, size)
                    left.discard(image_id)
    return found


def _looker(
    store: Store, ids: Sequence[str], places: Mapping[str, Location], max_pixels: int
) -> Callable[[Pairs], Part]:
    cv2.setNumThreads(1)
    names = pa.array(ids, pa.string())

    def work(pairs: Pairs) -> Part:
        started = time.perf_counter()
        wanted = [places[ids[node]] for node in np.union1d(pairs.a, pairs.b).tolist()]
        # Rows of a Parquet file are told by members `column/row`: the shorter ones come first.
        wanted.sort(key=lambda place: (place.uri, place.offset, len(place.member), place.member))
        held = {place.image_id: _seen(decode(data, max_pixels)) for place, data in read_images(wanted)}
        both = [(held[ids[a]], held[ids[b]]) for a, b in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)]
        count = len(both)
        points, maps = np.zeros(count, np.int16), np.zeros((count, 2, 3), np.float32)
        overlaps: dict[int, Overlap] = {}
        for row, (first, second) in enumerate(both):
            found = keypoints.aligned(first.described, second.described)
            common = closeup.overlap(first.described, second.described, found) if found else None
            if found and common:
                points[row], maps[row] = found.inliers, closeup.between(first.described, second.described, found)
                overlaps[row] = common
        features, rows = np.zeros((count, len(closeup.FEATURES)), np.float32), list(overlaps)
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            features[some] = closeup.measured([overlaps[row] for row in some])
        alike = np.full(count, -np.inf, np.float32)
        alike[rows] = closeup.score(features[rows])
        compared = [
            _compared(first.drawing, second.drawing, aligned if likely else None)
            for (first, second), aligned, likely in zip(both, maps, alike >= closeup.DOUBT, strict=True)
        ]
        columns = {
            **columns_of(names, pairs),
            "points": pa.array(points),
            "features": lists(features),
            "map": lists(maps.reshape(-1, 6)),
            "details": pa.array(compared, pa.list_(pa.float32())),
        }
        table = pa.table(columns, schema=records.CLOSEUPS)
        counts = {"pairs": count, "images": len(held)}
        return store.commit_part(
            CLOSEUPS.stage, pairs.key, {CLOSEUPS.table: table}, counts, time.perf_counter() - started
        )

    return work


@dataclass(frozen=True)
class _Seen:
    """What is held of an image while its pairs are looked at."""

    described: Described
    drawing: Drawing


def _seen(image: Image.Image) -> _Seen:
    return _Seen(keypoints.described(image), details.drawing(image))


def _compared(first: Drawing, second: Drawing, aligned: Floats | None) -> Floats | None:
    """The details of a pair that key points aligned, or whose thumbnails agree; None of any other."""
    unit = details.upright(first, second) if aligned is None else aligned.astype(np.float64)
    return None if unit is None else details.measured(first, second, unit)
