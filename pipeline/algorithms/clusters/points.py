"""The points of one worker, and the operations on them that a k-means fit needs. n points, D dimensions, K centroids.

All results are independent of how the points are distributed over workers and in which order they are stored:

- Sums of 16-bit vectors are exact: every fp16 number below 2 is a multiple of 2^-24 and float64 holds 53 bits, so up to 2^28 points
  add up without rounding, in any order.
- Labels are those of float64: each row is decided in the cheapest precision whose error bound allows it.
- Whether a point is drawn depends on its key, the seed and integer sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lodeset.pipeline.errors import LodesetError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Vectors = NDArray[np.float16] | Floats
Keys = NDArray[np.uint64]
Ints = NDArray[np.int64]

FIXED = 2**24  # squared distances are summed as integers, in units of the mean squared norm divided by this
BLOCK_SCORES = 2**20  # scores at a time: 4 MiB
# Half-precision products pay off if the product is most of the work; for narrow rows the surrounding code dominates.
LOW_DIMENSIONS, LOW_PRODUCTS = 64, 2**28


@dataclass(frozen=True)
class Total:
    """Count, sum [D] of the points, and sum of their squared norms in parts of 1 / FIXED."""

    count: int
    sums: Doubles
    squares: int


@dataclass(frozen=True)
class Picked:
    """Points that were drawn: keys, vectors as they are stored, and squared distances to their centroid."""

    keys: Keys
    vectors: Vectors
    squared: Floats


@dataclass(frozen=True)
class Outline:
    """For every cluster: its farthest point, and the loss if all of its points had to move to their second-nearest
    centroids.
    """

    farthest: Picked
    loss: Ints


@dataclass(frozen=True)
class Halves:
    """For every cluster, the points on the far side of a plane: their sums [K, D] and counts [K]."""

    sums: Doubles
    counts: Ints


@dataclass(frozen=True)
class Change:
    """The changes of a step: the clusters that gained or lost points, by how much, and how many points moved."""

    clusters: Ints
    sums: Doubles
    counts: Ints
    moved: int


def products(rows: Tensor, others: Tensor) -> Tensor:
    """rows [B, D] @ others [K, D].T; each number is independent of the other rows (tested).

    Uses oneDNN explicitly: torch sends fp32 to MKL, which is half as fast on AMD and whose rounding depends on the
    shape of the block.
    """
    if rows.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        if len(rows) == 1:  # a matrix-vector product adds in another order
            return products(torch.cat([rows, rows]), others)[:1]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, others, None, "none", [], "")
        return out
    return torch.nn.functional.linear(rows, others)


class Targets:
    """Centroids prepared for comparison with rows: centered, and in each precision with the error bound of a score.

    A score is x.c - |c|^2 / 2; the nearest centroid has the highest score, and |x - c|^2 = |x|^2 - 2 score.
    """

    def __init__(self, centroids: Tensor, mean: Tensor, low: bool) -> None:
        self.precise = centroids.double() - mean
        self.plain = self.precise.float()
        self.half_squares = self.precise.square().sum(1) / 2
        self.longest = float((2 * self.half_squares.max()).sqrt())
        self.low = self.plain.bfloat16() if low else None
        self.low_error = float((self.precise - self.low.double()).norm(dim=1).max()) if self.low is not None else 0.0
        self.bias = self.half_squares.float()

    def plain_bound(self, norms: Tensor) -> Tensor:
        """Maximum error of a score in fp32: rounding of D products and sums, of the operands and of the bias."""
        return (self.plain.shape[1] + 8) * 2.0**-24 * self.longest * (norms + self.longest)

    def low_bound(self, norms: Tensor, errors: Tensor) -> Tensor:
        """The same in bf16: the rounding of either operand, and a result with 8 bits."""
        rounding = errors * self.longest + norms * self.low_error
        return rounding + 2.0**-8 * norms * self.longest / 2 + self.plain_bound(norms)


def _best(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Highest score, its column, and the second highest. Overwrites `scores`."""
    top, column = scores.max(dim=1)
    scores.scatter_(1, column[:, None], -torch.inf)
    return top, column, scores.amax(dim=1)


class Points:
    """Vectors [n, D] held in memory (fp16, and a bf16 copy if that is faster) with one key each.

    Args:
        vectors: fp16 or fp32, finite. Sums use them as they are.
        keys: uint64, one per point, independent of its location (`keys_of`).
        threads: number of threads for products.

    Raises:
        LodesetError: a vector is not finite.
    """

    def __init__(self, vectors: Vectors, keys: Keys, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self.vectors = torch.from_numpy(np.ascontiguousarray(vectors))
        bad = sum(int((~block.isfinite().all(dim=1)).sum()) for block in self.vectors.split(4096))
        if bad:
            raise LodesetError(f"{bad} of {len(vectors)} vectors contain NaN or infinity: drop them before clustering")
        self.keys = keys
        self.mean = torch.zeros(vectors.shape[1], dtype=torch.float64)
        self.low: Tensor | None = None
        self.norms = self.errors = torch.zeros(0)
        self.unit = 1.0
        self.squared = self.gaps = torch.zeros(0)
        self.labels = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def _blocks(self, width: int) -> list[slice]:
        rows = min(2048, max(64, BLOCK_SCORES // max(1, width)))
        return [slice(start, min(start + rows, len(self))) for start in range(0, len(self), rows)]

    def total(self) -> Total:
        sums = torch.zeros(self.vectors.shape[1], dtype=torch.float64)
        squares = 0
        for block in self._blocks(self.vectors.shape[1]):
            rows = self.vectors[block].double()
            sums += rows.sum(0)
            squares += int((rows.square().sum(1) * FIXED).round().long().sum())
        return Total(len(self), sums.numpy(), squares)

    def begin(self, mean: Doubles, unit: float, low: bool) -> None:
        """Set the mean of all points, relative to which everything is compared: numbers are smaller there, and 8 bits
        are more precise.
        """
        # Rounded to fp32, so that every precision subtracts the same value; any nearby point would do.
        self.mean, self.unit = torch.from_numpy(mean).float().double(), unit
        shape = self.vectors.shape
        self.low = torch.empty(shape, dtype=torch.bfloat16) if low else None
        self.norms, self.errors = torch.zeros(len(self)), torch.zeros(len(self))
        for block in self._blocks(shape[1]):
            rows = self._plain(block)
            self.norms[block] = rows.norm(dim=1)
            if self.low is not None:
                self.low[block] = rows.bfloat16()
                self.errors[block] = (rows - self.low[block].float()).norm(dim=1)
        self.squared = torch.full((len(self),), torch.inf)
        self.labels = torch.full((len(self),), -1, dtype=torch.int64)

    def _plain(self, rows: slice | Tensor) -> Tensor:
        return self.vectors[rows].float() - self.mean.float()

    # -- nearest

    def nearest(self, centroids: Floats, exact: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest centroid of every point, int64 [n], the squared distance to it, and the difference to the squared
        distance of the second nearest, fp32 [n].

        Labels are those of float64 (ties: the lower number); distances have the accuracy of the precision that decided
        (bf16: about 1 % of the squared norm). If not `exact`, labels have that accuracy, too.
        """
        targets = Targets(torch.from_numpy(np.ascontiguousarray(centroids)), self.mean, self.low is not None)
        labels = torch.empty(len(self), dtype=torch.int64)
        squared, gaps = torch.empty(len(self)), torch.empty(len(self))
        unsure = [torch.zeros(0, dtype=torch.int64)]
        for block in self._blocks(len(centroids)):
            if self.low is not None and targets.low is not None:
                scores = products(self.low[block], targets.low).float().sub_(targets.bias)
                bound = targets.low_bound(self.norms[block], self.errors[block])
            else:
                scores = products(self._plain(block), targets.plain).sub_(targets.bias)
                bound = targets.plain_bound(self.norms[block])
            top, labels[block], second = _best(scores)
            squared[block] = self.norms[block].square() - 2 * top
            gaps[block] = 2 * (top - second)
            unsure.append(torch.nonzero(top - second <= 2 * bound)[:, 0] + block.start)
        if exact:
            self._settle(torch.cat(unsure), targets, labels, squared, gaps)
        return labels, squared.clamp_(min=0), gaps

    def _settle(self, unsure: Tensor, targets: Targets, labels: Tensor, squared: Tensor, gaps: Tensor) -> None:
        """Decide the rows that bf16 could not decide in fp32, and those that fp32 could not decide in float64."""
        rows_at_once = max(64, BLOCK_SCORES // len(targets.plain))
        if self.low is not None:
            undecided = [torch.zeros(0, dtype=torch.int64)]
            for rows in unsure.split(rows_at_once):
                top, column, second = _best(products(self._plain(rows), targets.plain).sub_(targets.bias))
                labels[rows], squared[rows] = column, self.norms[rows].square() - 2 * top
                gaps[rows] = 2 * (top - second)
                undecided.append(rows[top - second <= 2 * targets.plain_bound(self.norms[rows])])
            unsure = torch.cat(undecided)
        for rows in unsure.split(rows_at_once):
            precise = self.vectors[rows].double() - self.mean
            scores = (precise @ targets.precise.T - targets.half_squares).numpy()
            columns = torch.from_numpy(
                scores.argmax(axis=1)
            )  # the first of equal scores, which torch does not guarantee
            labels[rows] = columns
            squared[rows] = (precise - targets.precise[columns]).square().sum(1).float()

    # -- seeding

    def lowest(self, seed: int, count: int) -> Picked:
        """The `count` points with the lowest hashes: a sample that depends only on keys and seed."""
        order = np.argsort(hashed(self.keys, seed, 0), kind="stable")[:count]
        return self._picked(order)

    def lowest_distinct(self, seed: int, count: int) -> Picked:
        """Like `lowest`, of distinct points."""
        order = np.argsort(hashed(self.keys, seed, 0), kind="stable")
        _, first = np.unique(self.vectors[torch.from_numpy(order)].numpy() + 0, axis=0, return_index=True)
        return self._picked(order[np.sort(first)[:count]])

    def nearer(self, vectors: Vectors, offset: int) -> int:
        """Add candidates, numbered from `offset`; return the sum of squared distances to the nearest one, in units of 1
        / FIXED.
        """
        labels, squared, _ = self.nearest(vectors.astype(np.float32), exact=False)
        closer = squared < self.squared
        self.squared = torch.where(closer, squared, self.squared)
        self.labels = torch.where(closer, labels + offset, self.labels)
        return int((self._fixed() * FIXED).long().sum())

    def _fixed(self) -> Tensor:
        return self.squared.double() / self.unit

    def drawn(self, seed: int, turn: int, expected: int, potential: int) -> Picked:
        """Every point with probability min(1, expected * squared distance / potential) (Bahmani et al. 2012, algorithm
        2).
        """
        chance = expected * self._fixed().numpy() * FIXED / potential
        uniform = hashed(self.keys, seed, turn).astype(np.float64) / 2.0**64
        return self._picked(np.flatnonzero(uniform < chance))

    def weights(self, candidates: int) -> Ints:
        """The number of points nearest to each candidate."""
        return np.bincount(self.labels.numpy(), minlength=candidates)

    # -- Lloyd

    def start(self) -> None:
        """Forget the labels."""
        self.labels = torch.full((len(self),), -1, dtype=torch.int64)

    def step(self, centroids: Floats) -> Change:
        """Label the points again; return the sums and counts that moved, relative to the previous labels."""
        labels, self.squared, self.gaps = self.nearest(centroids)
        moved = torch.nonzero(labels != self.labels)[:, 0]
        before, after = self.labels[moved], labels[moved]
        self.labels = labels
        changed = torch.unique(torch.cat([before[before >= 0], after]))
        place = torch.full((len(centroids),), -1, dtype=torch.int64)
        place[changed] = torch.arange(len(changed))
        sums = torch.zeros(len(changed), self.vectors.shape[1], dtype=torch.float64)
        counts = torch.zeros(len(changed), dtype=torch.int64)
        for part in torch.arange(len(moved)).split(512):
            rows = self.vectors[moved[part]].double()
            sums.index_add_(0, place[after[part]], rows)
            known = before[part] >= 0
            if known.any():
                sums.index_add_(0, place[before[part][known]], rows[known], alpha=-1)
        counts += torch.bincount(place[after], minlength=len(changed))
        counts -= torch.bincount(place[before[before >= 0]], minlength=len(changed))
        return Change(changed.numpy(), sums.numpy(), counts.numpy(), len(moved))

    def outline(self, clusters: int) -> Outline:
        """The outline after a step; a cluster without points here has a farthest point of squared distance -1."""
        if not len(self):
            nothing = np.zeros((clusters, self.vectors.shape[1]), self.vectors.numpy().dtype)
            none = Picked(np.zeros(clusters, np.uint64), nothing, np.full(clusters, -1, np.float32))
            return Outline(none, np.zeros(clusters, np.int64))
        order = np.lexsort((self.keys, -self.squared.numpy(), self.labels.numpy()))
        labels, first = np.unique(self.labels.numpy()[order], return_index=True)
        rows = torch.zeros(clusters, dtype=torch.int64)
        rows[torch.from_numpy(labels)] = torch.from_numpy(order[first])
        occupied = np.zeros(clusters, bool)
        occupied[labels] = True
        squared = np.where(occupied, self.squared[rows].numpy(), np.float32(-1))
        loss = torch.zeros(clusters, dtype=torch.int64)
        loss.index_add_(0, self.labels, (self.gaps.double().clamp(0, 8 * self.unit) / self.unit * FIXED).long())
        return Outline(Picked(self.keys[rows.numpy()], self.vectors[rows].numpy(), squared), loss.numpy())

    def halves(self, normals: Floats, offsets: Floats) -> Halves:
        """The points x of each cluster with (x - mean).normal > offset; normals [K, D], offsets [K]."""
        across, least = torch.from_numpy(normals), torch.from_numpy(offsets)
        if self.low is not None:
            across = across.bfloat16()
        sums = torch.zeros(normals.shape, dtype=torch.float64)
        counts = torch.zeros(len(normals), dtype=torch.int64)
        for block in self._blocks(normals.shape[1]):
            labels = self.labels[block]
            rows = self.low[block] if self.low is not None else self._plain(block)
            far = torch.nonzero((rows * across[labels]).float().sum(1) > least[labels])[:, 0]
            sums.index_add_(0, labels[far], self.vectors[block][far].double())
            counts += torch.bincount(labels[far], minlength=len(counts))
        return Halves(sums.numpy(), counts.numpy())

    def farthest(self, count: int) -> Picked:
        """The `count` points farthest from their centroids (ties: the lowest key)."""
        order = np.lexsort((self.keys, -self.squared.numpy()))[:count]
        return self._picked(order[self.squared.numpy()[order] > 0])

    def _picked(self, rows: Ints) -> Picked:
        chosen = torch.from_numpy(np.ascontiguousarray(rows))
        squared = self.squared[chosen].numpy() if len(self.squared) else np.zeros(len(rows), np.float32)
        return Picked(self.keys[rows], self.vectors[chosen].numpy(), squared)


def hashed(keys: Keys, seed: int, turn: int) -> Keys:
    """A 64-bit hash of each key, the seed and the turn (SplitMix64's finalizer; Steele, Lea and Flood, OOPSLA 2014)."""
    offset = (seed * 0x9E3779B97F4A7C15 + turn * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**64
    mixed = keys + np.uint64(offset)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def keys_of(ids: list[str]) -> Keys:
    """The first 64 bits of image_ids, which are digests."""
    return np.array([int(i[:16], 16) for i in ids], np.uint64)


def merged(picked: list[Picked]) -> Picked:
    """The points that several workers picked, ordered by key."""
    keys = np.concatenate([p.keys for p in picked])
    order = np.argsort(keys, kind="stable")
    vectors: Vectors = np.concatenate([p.vectors for p in picked])
    return Picked(keys[order], vectors[order], np.concatenate([p.squared for p in picked])[order])
