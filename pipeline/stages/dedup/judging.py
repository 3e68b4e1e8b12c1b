"""Which candidate pairs are copies: by vectors and hashes, by thumbnails, and in doubt by full images."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.copies import closeup, verify, views
from lodeset.pipeline.algorithms.copies.hashes import hamming_pairs
from lodeset.pipeline.algorithms.copies.thresholds import LEAST_SCORE, Thresholds
from lodeset.pipeline.algorithms.sampling import ranks
from lodeset.pipeline.specs import DedupSpec
from lodeset.pipeline.stages.dedup.candidates import Seen
from lodeset.pipeline.stages.dedup.closeups import Looks
from lodeset.pipeline.stages.dedup.universe import Universe

# What is near by vector alone is looked at closely if it is among the nearest of an image and so much nearer than what the two
# find at `views.RANKS`. Of 10,926 pairs of 4,714 photographs 2,882 are, with 34 of 83 copies (vectors of MobileNetV2).
CLOSEST, NEARER = 3, 0.05
# Against reference sets a miss costs more than a lost image: so much lower log-odds of the same details are enough.
LENIENT = 2.5

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Neighbors = tuple[Ints, Ints, Floats]  # a, b and their similarity


@dataclass(frozen=True)
class Pairs:
    """P pairs a < b of nodes, with what is known of each."""

    a: Ints
    b: Ints
    similarity: Floats  # cosine; NaN where the two are no near neighbours
    distance: NDArray[np.int16]  # bits between the perceptual hashes
    hashed: NDArray[np.bool_]  # close by them
    verified: NDArray[np.int8]  # 1 yes, 0 no, -1 not asked
    orientation: NDArray[np.int16]  # of `views.ORIENTATIONS`, in which the pair was verified
    score: Floats  # log-odds of being copies; NaN where the pair was not aligned
    maps: Floats  # [P, 6]; NaN likewise
    points: Ints  # key points that agree in full images; -1 where these were not looked at
    details: Floats  # log-odds of showing the same down to their details; NaN where that was not compared
    linked: NDArray[np.bool_]  # taken as copies
    limit: Floats  # the highest `min_score` at which they are; infinite where it does not matter, -inf where none links them

    def chosen(self, rows: NDArray[np.bool_]) -> Pairs:
        return Pairs(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def judge(
    universe: Universe,
    neighbors: Neighbors,
    seen: Seen,
    limits: Thresholds,
    spec: DedupSpec,
) -> Pairs:
    """Which candidate pairs are copies. A pair that touches a reference image is judged by the reference threshold.

    Without `within`, two images that are both in nothing but the pool are never linked.
    """
    count = len(universe.ids)
    a, b, near = neighbors
    informative = np.flatnonzero(~universe.flat)
    hash_a, hash_b, _ = hamming_pairs(universe.phash[informative], spec.phash_distance)
    by_neighbor, by_hash = a * count + b, informative[hash_a] * count + informative[hash_b]
    worth = seen.score >= np.where(_large(universe, seen.a, seen.b, spec), closeup.WORTH, LEAST_SCORE)
    by_view = (seen.a * count + seen.b)[worth]
    known = np.unique(np.r_[by_neighbor, by_hash, by_view])
    a, b = known // count, known % count

    def spread(keys: Ints, values: NDArray[Any], empty: float) -> NDArray[Any]:
        column = np.full((len(known), *values.shape[1:]), empty, values.dtype)
        column[np.searchsorted(known, keys)] = values
        return column

    similarity = spread(by_neighbor, near, np.nan)
    touches = universe.reference[a] | universe.reference[b]
    allowed = _allowed(universe, a, b, spec)
    hashed = spread(by_hash, np.ones(len(by_hash), bool), False)
    candidate = allowed & (hashed | (similarity > np.where(touches, limits.reference, limits.pool)))
    verified = np.full(len(a), -1, np.int8)
    orientation = np.full(len(a), views.IDENTITY, np.int16)
    score, maps = spread(by_view, seen.score[worth], np.nan), spread(by_view, seen.maps[worth], np.nan)
    linked = candidate
    limit = np.full(len(a), -np.inf, np.float32)
    if spec.verify == "pixels":
        agreement, turned = verify.agreement(universe.thumbnails, a[candidate], b[candidate])
        upright = agreement >= np.where(touches[candidate], verify.AGREE_REFERENCE, verify.AGREE)
        verified[candidate] = upright
        orientation[candidate] = np.where(turned, views.MIRROR, views.IDENTITY)
        limit[verified == 1] = np.inf
        strict = np.ones(len(seen.a), bool)
        strict[worth] = ~touches[np.searchsorted(known, by_view)]
        up_to = seen.up_to(strict)[worth]
        # A pair that agrees as it is needs no map; any other is told as it was aligned.
        score[verified == 1], maps[verified == 1] = np.nan, np.nan
        aligned = allowed & ~np.isnan(score)
        limit[aligned] = spread(by_view, up_to, -np.inf)[aligned]
        verified[aligned] = limit[aligned] >= spec.min_score
        orientation[aligned] = spread(by_view, seen.orientation[worth], 0)[aligned]
        linked = verified == 1
    distance = np.bitwise_count(universe.phash[a] ^ universe.phash[b]).astype(np.int16)
    points = np.full(len(a), -1)
    apart = np.full(len(a), np.nan, np.float32)
    return Pairs(a, b, similarity, distance, hashed, verified, orientation, score, maps, points, apart, linked, limit)


def doubtful(universe: Universe, pairs: Pairs, floor: float, spec: DedupSpec) -> Ints:
    """The rows whose full images are to be compared: these hold more than thumbnails do, and thumbnails may be wrong.

    `floor` is the cosine down to which neighbours were searched for.

    They are sure where they agree upright, unless details are compared: two pages, or two screens of one program, agree at 32 pixels.
    What was aligned from a view is looked at whatever was found, as photographs of one
    scene look like copies at 32 pixels; what is near by vector or hash and agrees in no view only if it stands out there.
    """
    allowed = _allowed(universe, pairs.a, pairs.b, spec)
    large = _large(universe, pairs.a, pairs.b, spec) & allowed
    open_ = large & (np.isfinite(pairs.score) | (pairs.verified != 1))
    found = open_ & (np.isfinite(pairs.score) | _near(len(universe.ids), pairs, floor))
    if spec.min_detail_score is not None:
        found |= large & (pairs.verified == 1)
    return np.flatnonzero(found)


def _near(count: int, pairs: Pairs, floor: float) -> NDArray[np.bool_]:
    """Which pairs are among the nearest of one of their images by hash, or by vector and stand out from its other neighbours."""
    found = np.zeros(len(pairs.a), bool)
    hashed = np.flatnonzero(pairs.hashed)
    _, rows, rank = _ranked(pairs, hashed, pairs.distance[hashed])
    found[rows[rank < CLOSEST]] = True
    neighbors = np.flatnonzero(np.isfinite(pairs.similarity))
    ends, rows, rank = _ranked(pairs, neighbors, -pairs.similarity[neighbors])
    around = (rank >= views.RANKS.start) & (rank < views.RANKS.stop)
    sums = np.bincount(ends[around], pairs.similarity[rows[around]], minlength=count)
    counts = np.bincount(ends[around], minlength=count)
    # Who has fewer neighbours finds no more than what was searched for.
    usual = np.where(counts > 0, sums / np.maximum(counts, 1), floor)
    nearest = rows[rank < CLOSEST]
    around_both = (usual[pairs.a[nearest]] + usual[pairs.b[nearest]]) / 2
    found[nearest[pairs.similarity[nearest] - around_both > NEARER]] = True
    return found


def _ranked(pairs: Pairs, chosen: Ints, key: NDArray[Any]) -> tuple[Ints, Ints, Ints]:
    """Each end of the chosen rows, its row, and the rank of that row among those of the same image: the lowest `key` first."""
    ends, at = np.concatenate([pairs.a[chosen], pairs.b[chosen]]), np.tile(np.arange(len(chosen)), 2)
    order = np.lexsort((at, key[at], ends))
    return ends[order], chosen[at[order]], ranks(ends[order])


def settled(universe: Universe, pairs: Pairs, rows: Ints, looks: Looks, spec: DedupSpec) -> Pairs:
    """The pairs, `rows` of them as full images show them.

    These make copies of a pair by themselves, and strangers of one only if they are clear about it and no reference set is
    touched: there a miss costs more than a lost image.
    """
    found = looks.points > 0
    at, close = rows[found], looks.score[found]
    touches = universe.reference[pairs.a[at]] | universe.reference[pairs.b[at]]
    sure = np.isposinf(pairs.limit[at])  # thumbnails agree as they are: only details tell otherwise
    upheld = touches | sure | (close >= closeup.DOUBT)
    stands = (pairs.verified[at] == 1) & upheld
    copies = stands | (close >= spec.min_score)
    # What thumbnails say stays where it decides.
    taken = ~stands | (~sure & (close > np.nan_to_num(pairs.score[at], nan=-np.inf)))
    score, maps, orientation = pairs.score.copy(), pairs.maps.copy(), pairs.orientation.copy()
    score[at[taken]], maps[at[taken]] = close[taken], looks.maps[found][taken]
    orientation[at[taken]] = views.nearest_orientation(looks.maps[found][taken])
    verified, linked, points = pairs.verified.copy(), pairs.linked.copy(), pairs.points.copy()
    verified[at], linked[at] = copies, copies
    limit = pairs.limit.copy()
    limit[at] = np.maximum(np.where(upheld, limit[at], -np.inf), close)
    points[rows] = looks.points
    apart = pairs.details.copy()
    if spec.min_detail_score is not None:
        apart[rows] = looks.details
        touches = universe.reference[pairs.a] | universe.reference[pairs.b]
        others = apart < spec.min_detail_score - np.where(touches, LENIENT, 0)  # NaN is not
        verified[others], linked[others], limit[others] = 0, False, -np.inf
    now = replace(
        pairs,
        score=score,
        maps=maps,
        orientation=orientation,
        verified=verified,
        linked=linked,
        points=points,
        details=apart,
        limit=limit,
    )
    # Pairs that only a view brought, and nobody takes for copies, are no edges.
    highest = np.fmax(pairs.score, now.score)
    return now.chosen(pairs.hashed | np.isfinite(pairs.similarity) | (highest >= LEAST_SCORE) | linked)


def _allowed(universe: Universe, a: Ints, b: Ints, spec: DedupSpec) -> NDArray[np.bool_]:
    """Which pairs may be linked: without `within`, not two images that are both in nothing but the pool."""
    listed = universe.reference | universe.included
    return np.asarray(listed[a] | listed[b] | spec.within)


def _large(universe: Universe, a: Ints, b: Ints, spec: DedupSpec) -> NDArray[np.bool_]:
    """Which pairs can be looked at closely."""
    if spec.verify != "pixels" or not spec.closeups:
        return np.zeros(len(a), bool)
    return np.asarray(np.minimum(universe.side[a], universe.side[b]) >= closeup.LEAST_SIDE)
