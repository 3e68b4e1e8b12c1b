"""k-means over points that several workers hold. N points, K clusters, D dimensions.

Seeding is k-means|| (Bahmani et al., PVLDB 5(7), 2012): five rounds draw candidates in parallel, then greedy k-means++
(Arthur and Vassilvitskii, SODA 2007) chooses among them, weighted by the number of points that each represents. A Lloyd
step is one map over the workers and one sum. Results depend on points, keys and seed, but not on the number of workers
or their threads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.clusters.points import (
    FIXED,
    LOW_DIMENSIONS,
    LOW_PRODUCTS,
    Doubles,
    Floats,
    Ints,
    Keys,
    Picked,
    Points,
    Total,
    Vectors,
    hashed,
    merged,
    products,
)
from lodeset.pipeline.algorithms.hardware import has_bf16
from lodeset.pipeline.errors import LodesetError

ROUNDS = 5  # Bahmani et al., section 5: more rounds gain nothing
OVERSAMPLING = 0.3  # candidates per round, relative to K; more candidates improve the seeds but not the final result after moving clusters
SQUARE_CANDIDATES = 12_000  # up to this number, all distances between candidates are held: 550 MiB
BATCHES = 512  # above it, the seeds are chosen in this many draws
PLANES = 3  # steps of the 2-means that estimates the gain of splitting a cluster
MOVES_WORTH = 0.005  # clusters are moved as long as at least this share of them moved
TOLERANCE = 1e-4  # the fit ends after a step that improves the distance by a smaller share

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")


class Each(Protocol):
    """Runs a function on every worker's points; the results are in the order of the workers."""

    def __call__(self, work: Callable[[Points], Result]) -> list[Result]: ...


@dataclass(frozen=True)
class Fit:
    """Centroids fp32 [K, D]; the mean squared distance after each step, from that step's labels to their means; counts
    [K].
    """

    centroids: Floats
    distances: tuple[float, ...]
    counts: Ints


def choose_k(images: int) -> int:
    """max(N / 7440, min(N / 50, 256)), at least 1: 7440 is the mean cluster of LVD-142M (744M images, 100,000
    clusters).
    """
    return max(1, round(images / 7440), min(images // 50, 256))


def here(points: list[Points]) -> Each:
    """Run on points in this process."""

    def each(work: Callable[[Points], Result]) -> list[Result]:
        return [work(part) for part in points]

    return each


def fit(
    vectors: Vectors,
    k: int,
    iterations: int,
    seed: int,
    *,
    keys: Keys | None = None,
    spherical: bool = False,
    threads: int = 1,
    start: Floats | None = None,
) -> Fit:
    """k-means of vectors [N, D] in this process; arguments as for `fit_each`; keys identify the rows (0 .. N-1 by
    default).
    """
    keys = np.arange(len(vectors), dtype=np.uint64) if keys is None else keys
    order = np.argsort(keys, kind="stable")
    points = Points(vectors[order], keys[order], threads)
    return fit_each(here([points]), k, iterations, seed, spherical=spherical, start=start)


def fit_each(
    each: Each, k: int, iterations: int, seed: int, *, spherical: bool = False, start: Floats | None = None
) -> Fit:
    """k-means of the points that the workers hold.

    Args:
        iterations: maximum number of Lloyd steps; a fit ends when no point moves, or a step gains less than 1e-4 of the
        distance. spherical: centroids have length 1 (Dhillon and Modha, 2001); the points should, too. start: centroids
        [K, D] to start from instead of seeding.

    Raises:
        LodesetError: k exceeds the number of points, or of distinct points.
    """
    several = each(Points.total)
    totals = Total(
        sum(t.count for t in several), np.sum([t.sums for t in several], axis=0), sum(t.squares for t in several)
    )
    count, dimensions = totals.count, len(totals.sums)
    if not 1 <= k <= count:
        raise LodesetError(f"k = {k} clusters of {count} vectors: choose from 1 to {count}")
    low = _low(count * k * dimensions, dimensions)
    each(functools.partial(Points.begin, mean=totals.sums / count, unit=_unit(totals), low=low))
    centroids = seeds(each, k, seed, count) if start is None else np.ascontiguousarray(start, np.float32)
    if centroids.shape != (k, dimensions):
        raise LodesetError(
            f"k-means was given centroids {centroids.shape} to start from, but {k} x {dimensions} are needed"
        )
    return lloyd(each, centroids, iterations, spherical, totals)


def _unit(totals: Total) -> float:
    """The mean squared distance of the points from their mean, the unit of all distances."""
    mean = totals.sums / totals.count
    return max(totals.squares / FIXED / totals.count - float(mean @ mean), 2.0**-40)


# -- seeding


def seeds(each: Each, k: int, seed: int, count: int) -> Floats:
    """K points to start from, fp32 [K, D]."""
    first = merged(each(functools.partial(Points.lowest, seed=seed, count=1)))
    picked = [_rows(first, np.array([int(np.argmin(_order(first, seed)))]))]
    taken = 0
    for turn in range(1, ROUNDS + 2):
        potential = sum(each(functools.partial(Points.nearer, vectors=picked[-1].vectors, offset=taken)))
        taken += len(picked[-1].keys)
        if potential == 0 or turn > ROUNDS:
            break
        expected = max(16, math.ceil(OVERSAMPLING * k))
        draw = functools.partial(Points.drawn, seed=seed, turn=turn, expected=expected, potential=potential)
        more = merged(each(draw))
        if len(more.keys):
            picked.append(more)
        else:
            break
    vectors = np.concatenate([p.vectors for p in picked])
    weights = np.sum(each(functools.partial(Points.weights, candidates=len(vectors))), axis=0)
    distinct = np.sort(np.unique(vectors + 0, axis=0, return_index=True)[1])  # + 0: -0 is 0
    vectors, weights = vectors[distinct], np.maximum(weights[distinct], 1)
    if len(vectors) < k:
        more = merged(each(functools.partial(Points.lowest_distinct, seed=seed, count=k)))
        more = _rows(more, np.argsort(_order(more, seed), kind="stable"))
        vectors = np.concatenate([vectors, more.vectors])
        distinct = np.sort(np.unique(vectors + 0, axis=0, return_index=True)[1])[:k]
        if len(distinct) < k:
            raise LodesetError(
                f"k = {k} clusters, but only {len(distinct)} of {count} vectors differ: choose k of at most "
                f"{len(distinct)}"
            )
        return vectors[distinct].astype(np.float32)
    return _among(vectors.astype(np.float32), weights.astype(np.float64), k, np.random.default_rng(seed))


def _order(picked: Picked, seed: int) -> Keys:
    return hashed(picked.keys, seed, 0)


def _rows(picked: Picked, rows: NDArray[np.int64]) -> Picked:
    return Picked(picked.keys[rows], picked.vectors[rows], picked.squared[rows])


def _among(candidates: Floats, weights: Doubles, k: int, rng: np.random.Generator) -> Floats:
    """K of the weighted candidates [M, D]."""
    centred = torch.from_numpy(candidates - candidates.mean(0))
    if len(candidates) <= SQUARE_CANDIDATES:
        chosen = _greedy(_squares(centred, centred), weights, k, rng)
    else:
        chosen = _batched(centred, weights, k, rng)
    return candidates[chosen]


def _centroids(sums: Doubles, counts: NDArray[np.float64] | Ints, before: Floats, spherical: bool) -> Floats:
    """sums / counts, of length 1 if spherical; centroids without points or direction stay."""
    length = np.linalg.norm(sums, axis=1) if spherical else counts.astype(np.float64)
    good = (counts > 0) & (length > 0)
    centroids = before.copy()
    centroids[good] = sums[good] / length[good, None]
    return centroids


def _squares(rows: torch.Tensor, others: torch.Tensor) -> Floats:
    """Squared distances [rows, others]; 0 where the value could be rounding alone."""
    squares = others.square().sum(1)
    out = torch.empty(len(rows), len(others))
    for block in torch.arange(len(rows)).split(1024):
        own = rows[block].square().sum(1)
        squared = own[:, None] + squares - 2 * products(rows[block], others)
        squared[squared <= 1e-6 * (own[:, None] + squares)] = 0
        out[block] = squared
    return out.numpy()


def _greedy(squares: Floats, weights: Doubles, k: int, rng: np.random.Generator) -> Ints:
    """Greedy k-means++ over M candidates with known squared distances [M, M]: the best of 2 + ln K draws each time."""
    trials = 2 + int(math.log(k))
    plain = weights.astype(np.float32)
    chosen = [int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))]
    closest = squares[chosen[0]].copy()
    for _ in range(k - 1):
        closest[chosen[-1]] = 0
        cumulative = np.cumsum(closest * weights)
        if cumulative[-1] == 0:
            free = np.setdiff1d(np.arange(len(weights)), chosen)[: k - len(chosen)]
            return np.array([*chosen, *free])
        drawn = np.searchsorted(cumulative, rng.random(trials) * cumulative[-1], side="right")
        options = np.minimum(squares[drawn], closest)
        best = int((options @ plain).argmin())
        chosen.append(int(drawn[best]))
        closest = options[best]
    return np.array(chosen)


def _batched(centred: torch.Tensor, weights: Doubles, k: int, rng: np.random.Generator) -> Ints:
    """k-means++ with several draws at once (without replacement), for too many candidates to hold all their
    distances.
    """
    chosen = rng.choice(len(weights), 1, p=weights / weights.sum())
    closest = np.full(len(weights), np.inf, np.float32)
    fresh = chosen
    while True:
        closest = np.minimum(closest, np.concatenate([
            _squares(rows, centred[fresh]).min(1) for rows in centred.split(4096)
        ]))  # fmt: skip
        closest[chosen] = 0
        if len(chosen) == k:
            return chosen
        chance = weights * closest
        size = min(k - len(chosen), max(1, k // BATCHES), int((chance > 0).sum()))
        if size == 0:
            return np.concatenate([chosen, np.setdiff1d(np.arange(len(weights)), chosen)[: k - len(chosen)]])
        fresh = rng.choice(len(weights), size, replace=False, p=chance / chance.sum())
        chosen = np.concatenate([chosen, fresh])


# -- Lloyd


def lloyd(each: Each, centroids: Floats, iterations: int, spherical: bool, totals: Total) -> Fit:
    """Lloyd steps until no point moves or a step gains nothing.

    Empty clusters restart at the points farthest from their centroids. After every other step, as long as that moves
    any, centroids that contribute little are moved to clusters that are better split in two (`_moved`).
    """
    k, dimensions = centroids.shape
    squares = totals.squares / FIXED
    each(Points.start)
    sums, counts = np.zeros((k, dimensions)), np.zeros(k, np.int64)
    distances: list[float] = []
    before: Floats | None = None  # the centroids to return to if moving some turns out to be a loss
    moving = True
    for turn in range(iterations):
        moved = 0
        for change in each(functools.partial(Points.step, centroids=centroids)):
            sums[change.clusters] += change.sums
            counts[change.clusters] += change.counts
            moved += change.moved
        if not moved:
            break
        centroids = _centroids(sums, counts, centroids, spherical)
        within = squares - 2 * float(np.sum(sums * centroids))
        within = max(0.0, within + float(counts @ np.square(centroids, dtype=np.float64).sum(1))) / totals.count
        if before is not None and within > distances[-1]:
            centroids, before, moving = before, None, False
            continue
        before = None
        gained = distances[-1] - within if distances else within
        distances.append(within)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            centroids = _refilled(each, centroids, empty)
        elif moving and turn % 2 and turn < iterations - 2 and k > 1:
            before = centroids
            centroids, number = _moved(each, centroids, sums, counts, totals)
            moving = number > MOVES_WORTH * k
        elif gained < TOLERANCE * within:
            break
    return Fit(centroids, tuple(distances), counts)


def _moved(each: Each, centroids: Floats, sums: Doubles, counts: Ints, totals: Total) -> tuple[Floats, int]:
    """Move centroids from where they contribute little to where they contribute much; return the number of moves.

    The gain of splitting a cluster is that of a 2-means of its points; the loss of giving one up is what its points
    lose by moving to their second-nearest centroids. As long as the largest gain exceeds the smallest loss, the one
    cluster is split and the other given up; each cluster takes part at most once (in the spirit of Fritzke's breathing
    k-means, 2020, and of ISODATA). On real vectors this brings the inertia below that of greedy k-means++ over all
    points, which starts better and ends in a worse optimum (docs/log.md).
    """
    k = len(centroids)
    mean = totals.sums / totals.count
    outlines = each(functools.partial(Points.outline, clusters=k))
    loss = np.sum([o.loss for o in outlines], axis=0) / FIXED * _unit(totals)
    far, key = np.full(k, -1, np.float32), np.full(k, 2**64 - 1, np.uint64)
    ends = centroids.astype(np.float64)
    for outline in outlines:
        farthest = outline.farthest
        better = (farthest.squared > far) | ((farthest.squared == far) & (farthest.keys < key))
        far[better], key[better], ends[better] = (
            farthest.squared[better],
            farthest.keys[better],
            farthest.vectors[better],
        )
    normals = ends - centroids
    mean = mean.astype(np.float32).astype(np.float64)  # as `Points.begin` rounds it
    middles = centroids - mean
    far_ends = near_ends = ends
    gain = np.zeros(k)
    for _ in range(PLANES):
        offsets = np.einsum("kd,kd->k", normals, middles)
        cut = functools.partial(Points.halves, normals=normals.astype(np.float32), offsets=offsets.astype(np.float32))
        halves = each(cut)
        on_far_side = np.sum([h.counts for h in halves], axis=0)
        far_sums = np.sum([h.sums for h in halves], axis=0)
        far_ends = far_sums / np.maximum(on_far_side, 1)[:, None]
        near_ends = (sums - far_sums) / np.maximum(counts - on_far_side, 1)[:, None]
        normals = far_ends - near_ends
        middles = (far_ends + near_ends) / 2 - mean
        gain = on_far_side * (counts - on_far_side) / np.maximum(counts, 1) * np.square(normals).sum(1)
    centroids, used, number = centroids.copy(), np.zeros(k, bool), 0
    given = iter(np.argsort(loss, kind="stable"))
    for cluster in np.argsort(-gain, kind="stable"):
        if used[cluster]:
            continue
        used[cluster] = True
        spare = next((c for c in given if not used[c]), None)
        if spare is None or gain[cluster] <= loss[spare]:
            break
        used[spare] = True
        centroids[cluster], centroids[spare] = far_ends[cluster], near_ends[cluster]
        number += 1
    return centroids, number


def _refilled(each: Each, centroids: Floats, empty: Ints) -> Floats:
    far = merged(each(functools.partial(Points.farthest, count=4 * len(empty))))
    far = _rows(far, np.lexsort((far.keys, -far.squared)))
    distinct = np.sort(np.unique(far.vectors + 0, axis=0, return_index=True)[1])[: len(empty)]
    centroids = centroids.copy()
    centroids[empty[: len(distinct)]] = far.vectors[distinct]
    return centroids


# -- assign


def assign(vectors: Vectors, centroids: Floats, threads: int = 1) -> tuple[NDArray[np.int32], Floats]:
    """The nearest centroid of each vector, int32 [N] (ties: the lower number), and the squared distance to it, fp32
    [N].
    """
    centroids = np.ascontiguousarray(centroids, np.float32)
    points = Points(vectors, np.zeros(len(vectors), np.uint64), threads)
    points.begin(centroids.mean(0, dtype=np.float64), 1.0, _low(vectors.size * len(centroids), vectors.shape[1]))
    labels, _, _ = points.nearest(centroids)
    squared = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), 4096):
        rows = slice(start, start + 4096)
        squared[rows] = np.square(vectors[rows].astype(np.float32) - centroids[labels[rows].numpy()]).sum(1)
    return labels.numpy().astype(np.int32), squared


def _low(products: int, dimensions: int) -> bool:
    """Whether half precision is used first."""
    return has_bf16() and dimensions >= LOW_DIMENSIONS and products >= LOW_PRODUCTS
