"""In which order images are trained on: a function of (seed, epoch) alone.

An epoch shows every image once, or as often as its weight says. It is shuffled as a whole, or in blocks of shards that fit a
cache together, block after block. Each epoch ends before its last, incomplete global batch.

Shapes: n images of the index, S shards, m places of an epoch.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.integer]

PURPOSES = ("order", "crops", "mask_counts", "masks", "times", "blocks", "steps")
Purpose = Literal["order", "crops", "mask_counts", "masks", "times", "blocks", "steps"]


def generator(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """An independent random generator for one purpose and key (epoch, or step and position)."""
    return np.random.default_rng([seed, PURPOSES.index(purpose), *key])


@dataclass(frozen=True, eq=False)
class Blocks:
    """Shards too many for the cache: `shard` [n] holds an image, `size_bytes` [S], `limit_bytes` is what a block may hold.

    A shard larger than that is a block of its own.
    """

    shard: NDArray[np.int32]
    size_bytes: Rows
    limit_bytes: int

    def digest(self) -> str:
        """SHA-256 of all that the order depends on: the same images in other shards come in another order."""
        told = hashlib.sha256(self.shard.tobytes())
        told.update(self.size_bytes.tobytes())
        told.update(str(self.limit_bytes).encode())
        return told.hexdigest()


@dataclass(frozen=True, eq=False)
class Order:
    """`images`: n. `weights` [n]: how often an epoch shows each, 1 where none are given. `blocks`: see there; none: all at once.

    Each process that asks for rows holds an epoch of them, 4 bytes a place, and three times that while it is made.
    """

    images: int
    batch: int
    seed: int
    weights: Floats | None = None
    blocks: Blocks | None = None

    @cached_property
    def places(self) -> int:
        """Of an epoch: n, or the sum of the weights, rounded down."""
        return self.images if self.weights is None else _whole(self.weights)

    @cached_property
    def steps(self) -> int:
        """Whole batches of an epoch."""
        return self.places // self.batch

    def rows(self, step: int) -> Rows:
        """Index rows of the global batch of a step."""
        epoch, position = divmod(step, self.steps)
        return self.epoch(epoch)[position * self.batch : (position + 1) * self.batch]

    def epoch(self, epoch: int) -> Rows:
        """Index rows of one epoch, [m]."""
        return _epoch(self, epoch)

    def shards_at(self, step: int) -> tuple[Rows, Rows]:
        """Shards of the block that a step's first image lies in, and of the one that comes next, maybe of the next epoch.

        `blocks` must be there.
        """
        assert self.blocks is not None
        epoch = step // self.steps
        now = _blocks(self.blocks, self.seed, epoch)
        first = self.blocks.shard[self.rows(step)[0]]
        at = next(number for number, shards in enumerate(now) if first in shards)
        return now[at], now[at + 1] if at + 1 < len(now) else _blocks(self.blocks, self.seed, epoch + 1)[0]


# Steps follow one another: only the epoch that goes on is needed. 10^7 rows take 0.5 s, a second with weights.
@lru_cache(maxsize=1)
def _epoch(order: Order, epoch: int) -> Rows:
    rows: Rows = np.arange(order.images, dtype=np.int32 if order.images < 2**31 else np.int64)
    if order.weights is not None:
        rows = np.repeat(rows, times(order.weights, generator(order.seed, "times", epoch)))
    rows = generator(order.seed, "order", epoch).permutation(rows)
    if order.blocks is not None:
        turn = np.empty(len(order.blocks.size_bytes), np.int64)
        for number, shards in enumerate(_blocks(order.blocks, order.seed, epoch)):
            turn[shards] = number
        rows = rows[np.argsort(turn[order.blocks.shard[rows]], kind="stable")]
    rows.setflags(write=False)  # every step reads the same array
    return rows


@lru_cache(maxsize=2)  # this epoch's and the next one's
def _blocks(blocks: Blocks, seed: int, epoch: int) -> list[Rows]:
    """The shards of each block, in the order in which an epoch comes to them: shards in random order, as many as fit."""
    order = generator(seed, "blocks", epoch).permutation(len(blocks.size_bytes))
    found: list[list[int]] = []
    held = 0
    for shard, size in zip(order.tolist(), blocks.size_bytes[order].tolist(), strict=True):
        if not found or held + size > blocks.limit_bytes:
            found.append([])
            held = 0
        found[-1].append(shard)
        held += size
    return [np.array(block, np.int64) for block in found]


def times(weights: Floats, rng: np.random.Generator) -> Rows:
    """How often each image [n] is shown: its weight rounded down or up at random; all together the sum, rounded down.

    Systematic sampling (Madow 1949) over the images in random order: the line of all weights, end to end, is cut at every integer
    from a random start, which leaves out what is over of the sum.
    """
    order = rng.permutation(len(weights))
    ends = np.cumsum(weights[order])
    total = _whole(weights)
    start = rng.random() * (1 - max(0.0, float(ends[-1]) - total))
    edges = np.floor(ends + start).astype(np.int64)
    edges[-1] = total  # whatever the sum lost or won in its last digits
    shown = np.empty(len(weights), np.int64)
    shown[order] = np.diff(edges, prepend=0)
    return shown


def _whole(weights: Floats) -> int:
    return int(float(weights.sum()) + 1e-6)
