"""The order of training images, which depends only on (seed, epoch).

An epoch shows every image once, or as often as its weight says. It is shuffled as a whole, or in blocks of shards that
fit a cache, one block after the other. Each epoch ends before its last, incomplete global batch.

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
    """Shards that exceed the cache: `shard` [n] is the shard of each image, `size_bytes` [S], `limit_bytes` is the
    maximum size of a block.

    A shard larger than the limit is a block of its own.
    """

    shard: NDArray[np.int32]
    size_bytes: Rows
    limit_bytes: int

    def digest(self) -> str:
        """SHA-256 of everything that the order depends on: the same images in other shards get another order."""
        sha256 = hashlib.sha256(self.shard.tobytes())
        sha256.update(self.size_bytes.tobytes())
        sha256.update(str(self.limit_bytes).encode())
        return sha256.hexdigest()


@dataclass(frozen=True, eq=False)
class Order:
    """`images`: n. `weights` [n]: how often an epoch shows each image, by default once. `blocks`: see `Blocks`; None: a
    single block.

    Each process that asks for rows holds one epoch of them, 4 bytes per place, and three times that while it is being
    made.
    """

    images: int
    batch: int
    seed: int
    weights: Floats | None = None
    blocks: Blocks | None = None

    @cached_property
    def places(self) -> int:
        """Places of an epoch: n, or the sum of the weights, rounded down."""
        return self.images if self.weights is None else _whole(self.weights)

    @cached_property
    def steps(self) -> int:
        """Complete batches of an epoch."""
        return self.places // self.batch

    def rows(self, step: int) -> Rows:
        """Index rows of the global batch of a step."""
        epoch, position = divmod(step, self.steps)
        return self.epoch(epoch)[position * self.batch : (position + 1) * self.batch]

    def epoch(self, epoch: int) -> Rows:
        """Index rows of one epoch, [m]."""
        return _epoch(self, epoch)

    def shards_at(self, step: int) -> tuple[Rows, Rows]:
        """Shards of the block that contains a step's first image, and of the next block, which may belong to the next
        epoch.

        `blocks` must be set.
        """
        assert self.blocks is not None
        epoch = step // self.steps
        blocks = _blocks(self.blocks, self.seed, epoch)
        first = self.blocks.shard[self.rows(step)[0]]
        at = next(number for number, shards in enumerate(blocks) if first in shards)
        return blocks[at], blocks[at + 1] if at + 1 < len(blocks) else _blocks(self.blocks, self.seed, epoch + 1)[0]


# Steps follow one another, so only the current epoch is needed. 10^7 rows take 0.5 s, or a second with weights.
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


@lru_cache(maxsize=2)  # the current epoch and the next one
def _blocks(blocks: Blocks, seed: int, epoch: int) -> list[Rows]:
    """The shards of each block, in the order of an epoch: shards in random order, as many per block as fit."""
    order = generator(seed, "blocks", epoch).permutation(len(blocks.size_bytes))
    packed: list[list[int]] = []
    size_bytes = 0
    for shard, size in zip(order.tolist(), blocks.size_bytes[order].tolist(), strict=True):
        if not packed or size_bytes + size > blocks.limit_bytes:
            packed.append([])
            size_bytes = 0
        packed[-1].append(shard)
        size_bytes += size
    return [np.array(block, np.int64) for block in packed]


def times(weights: Floats, rng: np.random.Generator) -> Rows:
    """How often each image [n] is shown: its weight, rounded down or up at random; the total is the sum of the weights,
    rounded down.

    Systematic sampling (Madow 1949) over the images in random order: the line of all weights, end to end, is cut at
    every integer from a random start; the fractional part of the sum is left out.
    """
    order = rng.permutation(len(weights))
    ends = np.cumsum(weights[order])
    total = _whole(weights)
    start = rng.random() * (1 - max(0.0, float(ends[-1]) - total))
    edges = np.floor(ends + start).astype(np.int64)
    edges[-1] = total  # corrects rounding of the sum
    shown = np.empty(len(weights), np.int64)
    shown[order] = np.diff(edges, prepend=0)
    return shown


def _whole(weights: Floats) -> int:
    return int(float(weights.sum()) + 1e-6)
