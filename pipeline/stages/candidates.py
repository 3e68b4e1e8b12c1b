"""The two steps of near-duplicates: pairs that look alike in some view are found, then verified on their thumbnails (Ray).

Both are committed in parts that know nothing of thresholds, so that another threshold re-uses them.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.algorithms import evidence, views
from pipeline.algorithms.hardware import has_bf16
from pipeline.dag.fingerprint import digest
from pipeline.dag.stage import Context
from pipeline.dag.store import Part, Store
from pipeline.engines.ray import map_with_state
from pipeline.stages.parts import Block, blocks, made
from pipeline.stages.universe import Members, Universe, thumbnails_of

VERSION = 1
FIND, VERIFY = "dedup_views", "dedup_verify"
PAIRS_PER_PART = 16_384
MATCHES = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("view", pa.int16()), ("similarity", pa.float32())])
SURROUNDINGS = pa.schema([("surroundings", pa.float32())])
MAP = ("xx", "xy", "x", "yx", "yy", "y")
VERIFIED = pa.schema([("score", pa.float32()), *((name, pa.float32()) for name in MAP)])

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Thumbnails = Callable[[], NDArray[np.uint8]]


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

    def copies(self, strict: NDArray[np.bool_], min_score: float) -> NDArray[np.bool_]:
        """Which pairs are copies; where not `strict`, a miss costs more than a lost image, and a kind of picture is enough."""
        surroundings = self.similarity - self.stands_out
        clear = (self.stands_out >= evidence.STANDS_CLEAR) | (surroundings < evidence.SPARSE)
        return (self.score >= min_score) & (clear | ~strict)


_NO_NODES, _NOTHING = np.zeros(0, np.int64), np.zeros(0, np.float32)
NONE = Seen(_NO_NODES, _NO_NODES, np.zeros(0, np.int16), _NOTHING, _NOTHING, _NOTHING, np.zeros((0, 6), np.float32))


@dataclass(frozen=True)
class Pairs:
    key: str
    candidates: views.Candidates


def find_and_verify(context: Context, sets: Sequence[Members], universe: Universe) -> tuple[Seen, int, int]:
    """The pairs that stand out in some view, aligned and weighed; parts made and parts in all."""
    count = len(universe.ids)
    # What is compared, and by what: ids alone do not say how thumbnails were made.
    basis = digest(VERSION, evidence.identity(), hashlib.sha256(universe.thumbnails.tobytes()).hexdigest())
    thumbnails = functools.partial(
        thumbnails_of, context.store, tuple(file for one in sets for file in one.images), universe.ids
    )
    found, made_finding, finding = _found(context, count, basis, thumbnails)
    candidates = views.standing_out(found, count)
    if not context.config["within"]:
        counts = universe.reference | universe.included
        candidates = candidates[np.flatnonzero(counts[candidates.a] | counts[candidates.b])]
    work = []
    for start in range(0, len(candidates.a), PAIRS_PER_PART):
        part = candidates[start : start + PAIRS_PER_PART]
        key = _key(basis, part)
        work.append((key, Pairs(key, part), len(part.a)))
    worker = functools.partial(_verifier, context.store, thumbnails)
    make = functools.partial(map_with_state, worker, cpus=context.cpus, address=context.ray_address)
    parts, new = made(context, VERIFY, work, make, unit="pairs")
    table = context.store.table([part.files["verified"] for part in parts], None, VERIFIED)
    a, b = candidates.a, candidates.b
    maps = np.stack([table[name].to_numpy() for name in MAP], axis=1)
    backwards = a > b
    maps[backwards] = _undone(maps[backwards])
    seen = Seen(
        np.minimum(a, b),
        np.maximum(a, b),
        views.orientations(candidates.view, backwards),
        candidates.similarity,
        candidates.stands_out,
        table["score"].to_numpy(),
        maps,
    )
    return seen, made_finding + len(new), finding + len(parts)


def _undone(maps: Floats) -> Floats:
    """Affine maps [P, 6] the other way round."""
    square = np.tile(np.eye(3), (len(maps), 1, 1))
    square[:, :2] = maps.reshape(-1, 2, 3)
    return np.asarray(np.linalg.pinv(square)[:, :2].reshape(-1, 6), dtype=np.float32)


# -- find


def _found(context: Context, count: int, basis: str, thumbnails: Thumbnails) -> tuple[views.Found, int, int]:
    work = blocks(count, context.speed["part_images"], FIND, basis)
    worker = functools.partial(_finder, context.store, thumbnails)
    make = functools.partial(map_with_state, worker, cpus=context.cpus, address=context.ray_address)
    parts, new = made(context, FIND, work, make)
    table = context.store.table([part.files["matches"] for part in parts], None, MATCHES)
    surroundings = context.store.table([part.files["surroundings"] for part in parts], None, SURROUNDINGS)
    found = views.Found(
        table["a"].to_numpy(),
        table["b"].to_numpy(),
        table["view"].to_numpy(),
        table["similarity"].to_numpy(),
        surroundings["surroundings"].to_numpy(),
    )
    return found, len(new), len(parts)


def _finder(store: Store, thumbnails: Thumbnails) -> Callable[[Block], Part]:
    index = views.ViewIndex(thumbnails(), evidence.model().whitening, has_bf16())

    def find(block: Block) -> Part:
        started = time.time()
        found = index.search(block.start, block.stop)
        matches = pa.table(
            {"a": found.a, "b": found.b, "view": found.view, "similarity": found.similarity}, schema=MATCHES
        )
        surroundings = pa.table({"surroundings": found.surroundings}, schema=SURROUNDINGS)
        counts = {"images": block.stop - block.start}
        return store.commit_part(
            FIND, block.key, {"matches": matches, "surroundings": surroundings}, counts, time.time() - started
        )

    return find


# -- verify


def _key(basis: str, part: views.Candidates) -> str:
    columns = (part.a, part.b, part.view, part.similarity, part.stands_out)
    return digest(VERIFY, basis, [hashlib.sha256(c.tobytes()).hexdigest() for c in columns])


def _verifier(store: Store, thumbnails: Thumbnails) -> Callable[[Pairs], Part]:
    pixels, starts, fitted = thumbnails(), views.starts(), evidence.model()

    def verify(pairs: Pairs) -> Part:
        started = time.time()
        found = evidence.weigh(pixels, pairs.candidates, starts[pairs.candidates.view], fitted)
        maps = dict(zip(MAP, found.maps.reshape(-1, 6).T, strict=True))
        table = pa.table({"score": found.score, **maps}, schema=VERIFIED)
        return store.commit_part(
            VERIFY, pairs.key, {"verified": table}, {"pairs": len(found.score)}, time.time() - started
        )

    return verify
