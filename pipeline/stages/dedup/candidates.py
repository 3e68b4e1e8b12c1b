"""The two steps of near-duplicates: pairs that look alike in some view are found, then verified on their thumbnails (Ray).

Both are committed in parts that know nothing of thresholds nor of the rest of the pool, so that another threshold, and a grown
pool, re-use them: what two images have in common is measured once. How far a pair stands out, and with it what it is worth, is
found anew in each run.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.copies import evidence, shipped, views
from lodeset.pipeline.algorithms.hardware import has_bf16
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context
from lodeset.pipeline.dag.store import File, Part, Store
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.specs import DedupRuntime, DedupSpec
from lodeset.pipeline.stages.dedup.generations import Between, Generation, between
from lodeset.pipeline.stages.dedup.pairwise import Kind, Known, Pairs, columns_of, known, lists, matrix
from lodeset.pipeline.stages.dedup.universe import Members, Universe, thumbnails_of
from lodeset.pipeline.tables import records

VERSION = 2
FIND = "dedup_views"
MATCHES = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("view", pa.int16()), ("similarity", pa.float32())])
MEASURED = Kind("dedup_verify", "measured", "measured_by", pairs=8_192, seconds=5e-4)

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Seen:
    """P pairs a < b of nodes that look alike in some view, sorted."""

    a: Ints
    b: Ints
    orientation: NDArray[np.int16]  # of `views.ORIENTATIONS`, that turns a into b
    similarity: Floats
    stands_out: Floats
    score: Floats  # log-odds of being copies, from their pixels
    maps: Floats  # [P, 6]: the affine map from b's coordinates to a's, both from -1 to 1, row by row

    def up_to(self, strict: NDArray[np.bool_]) -> Floats:
        """Up to which `min_score` pairs are copies, -inf where at none; where not `strict`, a miss costs more than a lost image,
        and a kind of picture is enough.
        """
        surroundings = self.similarity - self.stands_out
        clear = (self.stands_out >= evidence.STANDS_CLEAR) | (surroundings < evidence.SPARSE)
        return np.where(clear | ~strict, self.score, -np.inf).astype(np.float32)


_NO_NODES, _NOTHING = np.zeros(0, np.int64), np.zeros(0, np.float32)
NONE = Seen(_NO_NODES, _NO_NODES, np.zeros(0, np.int16), _NOTHING, _NOTHING, _NOTHING, np.zeros((0, 6), np.float32))


@dataclass(frozen=True)
class Looked:
    """What was found, and what the next run needs of it."""

    seen: Seen
    measured: Known
    parts: int
    parts_made: int


def find_and_verify(
    context: Context[DedupSpec, DedupRuntime],
    sets: Sequence[Members],
    universe: Universe,
    generations: Sequence[Generation],
) -> Looked:
    """The pairs that stand out in some view, aligned and weighed."""
    # A thumbnail is what ingest of some version made of the bytes that the id names.
    makers = {(a.stage, a.version) for role, a in context.inputs.items() if role.startswith("images:")}
    basis = digest(VERSION, shipped.identity(shipped.EVIDENCE), sorted(makers))
    files = tuple(file for one in sets for file in one.images)
    found, finding, made_finding = _found(context, generations, files, basis)
    candidates = views.standing_out(found, len(universe.ids))
    if not context.spec.within:
        counts = universe.reference | universe.included
        candidates = candidates[np.flatnonzero(counts[candidates.a] | counts[candidates.b])]
    measured = _measured(context, universe, files, candidates, basis)
    features = evidence.with_candidates(matrix(measured.table, "features", evidence.MEASURED), candidates)
    maps = matrix(measured.table, "map", 6).copy()
    a, b = candidates.a, candidates.b
    backwards = a > b
    maps[backwards] = _undone(maps[backwards])
    seen = Seen(
        np.minimum(a, b),
        np.maximum(a, b),
        views.orientations(candidates.view, backwards),
        candidates.similarity,
        candidates.stands_out,
        evidence.model().score(features),
        maps,
    )
    return Looked(seen, measured, finding + measured.parts, made_finding + measured.parts_made)


def _undone(maps: Floats) -> Floats:
    """Affine maps [P, 6] the other way round."""
    square = np.tile(np.eye(3), (len(maps), 1, 1))
    square[:, :2] = maps.reshape(-1, 2, 3)
    return np.asarray(np.linalg.pinv(square)[:, :2].reshape(-1, 6), dtype=np.float32)


# -- find


def _found(
    context: Context[DedupSpec, DedupRuntime], generations: Sequence[Generation], files: Sequence[File], basis: str
) -> tuple[views.Found, int, int]:
    """What each image found, by node; parts in all and parts made."""
    work = between(generations, context.runtime.part_images, lambda _: (FIND, basis))
    worker = functools.partial(_finder, context.store, files, generations)

    def seconds(item: Between) -> float:
        return (item.stop - item.start) * (5e-4 + 1e-6 * len(generations[item.base].ids))

    make = functools.partial(map_with_state, worker, cpus=context.cpus, address=context.ray_address, seconds=seconds)
    parts, new = made(context, FIND, work, make)
    found = [views.Found(_NO_NODES, _NO_NODES, np.zeros(0, np.int16), _NOTHING)]
    for (_, item, _), part in zip(work, parts, strict=True):
        table = context.store.table([part.files["matches"]])
        a = generations[item.queries].nodes[table["a"].to_numpy()]
        b = generations[item.base].nodes[table["b"].to_numpy()]
        one = views.Found(a, b, table["view"].to_numpy(), table["similarity"].to_numpy())
        found.append(one[(a >= 0) & (b >= 0)])
    return views.joined(found), len(parts), len(new)


def _finder(store: Store, files: Sequence[File], generations: Sequence[Generation]) -> Callable[[Between], Part]:
    whitening, half = evidence.model().whitening, has_bf16()

    @functools.lru_cache(maxsize=2)
    def pixels(number: int) -> Bytes:
        return thumbnails_of(store, files, generations[number].ids)

    @functools.lru_cache(maxsize=1)
    def index(number: int) -> views.ViewIndex:
        return views.ViewIndex(pixels(number), whitening, half)

    def find(item: Between) -> Part:
        started = time.perf_counter()
        found = index(item.base).search(pixels(item.queries), item.start, item.stop, item.queries == item.base)
        matches = pa.table(
            {"a": found.a, "b": found.b, "view": found.view, "similarity": found.similarity}, schema=MATCHES
        )
        counts = {"images": item.stop - item.start}
        return store.commit_part(FIND, item.key, {"matches": matches}, counts, time.perf_counter() - started)

    return find


# -- verify


def _measured(
    context: Context[DedupSpec, DedupRuntime],
    universe: Universe,
    files: Sequence[File],
    candidates: views.Candidates,
    basis: str,
) -> Known:
    """Features and maps of pairs; what the run before measured is taken from its files."""
    worker = functools.partial(_verifier, context.store, files, universe.ids)
    pairs = candidates.a, candidates.b, candidates.view
    return known(context, MEASURED, basis, universe.ids, pairs, worker)


def _verifier(store: Store, files: Sequence[File], ids: Sequence[str]) -> Callable[[Pairs], Part]:
    pixels, starts, whitening = thumbnails_of(store, files, ids), views.starts(), evidence.model().whitening
    names = pa.array(ids, pa.string())

    def verify(pairs: Pairs) -> Part:
        started = time.perf_counter()
        features, maps = evidence.measured(pixels, pairs.a, pairs.b, starts[pairs.view], whitening)
        columns = {**columns_of(names, pairs), "features": lists(features), "map": lists(maps.reshape(-1, 6))}
        table = pa.table(columns, schema=records.MEASURED)
        counts = {"pairs": len(pairs.a)}
        return store.commit_part(
            MEASURED.stage, pairs.key, {MEASURED.table: table}, counts, time.perf_counter() - started
        )

    return verify
