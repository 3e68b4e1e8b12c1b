"""Shards -> batches, at random, without reading a shard from end to end.

What a batch holds depends on (seed, step, global batch) alone: not on the number of workers or loader processes, nor
on where a run was interrupted. All randomness is drawn from generators keyed by those numbers and a purpose.

Shapes: n images of the index, b images a worker and step, L local crops, N patches a global crop.
"""

import hashlib
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.algorithms.images import Unreadable, decode
from pipeline.errors import LodesetError
from training.augment import augment
from training.config import TrainingConfig
from training.masking import block_mask, mask_counts

INDEX_COLUMNS = ("image_id", "shard", "offset", "size_bytes")
UNREADABLE_IN_A_ROW = 100  # replacements tried before a run gives up
PURPOSES = ("order", "crops", "mask_counts", "masks")
Purpose = Literal["order", "crops", "mask_counts", "masks"]


def generator(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """An independent random generator for one purpose and key (epoch, or step and position)."""
    return np.random.default_rng([seed, PURPOSES.index(purpose), *key])


@dataclass(frozen=True)
class ShardIndex:
    """Where each image's bytes lie, 32 bytes of memory an image: shards (URLs) and columns of n rows."""

    shards: tuple[str, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size_bytes: NDArray[np.int32]
    ids: NDArray[np.uint8]  # [n, 16], the bytes behind the 32 hex digits

    def __len__(self) -> int:
        return len(self.shard)

    def image_id(self, row: int) -> str:
        return bytes(self.ids[row]).hex()

    def digest(self) -> str:
        """SHA-256 of the image ids in their order: what a run was trained on, wherever it lies."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()

    def read(self, rows: Sequence[int]) -> list[bytes | None]:
        """Encoded bytes of these rows, None for those that cannot be read or are cut short."""
        if not rows:
            return []
        filesystem, _ = fsspec.core.url_to_fs(self.shards[0])
        starts = [int(self.offset[row]) for row in rows]
        ends = [start + int(self.size_bytes[row]) for start, row in zip(starts, rows, strict=True)]
        urls = [self.shards[self.shard[row]] for row in rows]
        # Remote file systems fetch the ranges concurrently; a failed one comes back as its exception.
        payloads = filesystem.cat_ranges(urls, starts, ends, on_error="return")
        return [
            bytes(payload) if isinstance(payload, bytes) and len(payload) == end - start else None
            for payload, start, end in zip(payloads, starts, ends, strict=True)
        ]


def open_index(urls: Sequence[str]) -> ShardIndex:
    """Reads `index.parquet` files (paths or fsspec URLs on one file system): rows in the order of their image_ids, so that what
    is trained does not depend on which shard holds what.

    Raises:
        LodesetError: no file given, a file or column is missing, or an image_id is not 32 hex digits.
    """
    if not urls:
        raise LodesetError("no index.parquet given: training needs at least one")
    shards: list[str] = []
    columns: dict[str, list[NDArray[np.generic]]] = {name: [] for name in INDEX_COLUMNS}
    for url in urls:
        filesystem, path = fsspec.core.url_to_fs(url)
        try:
            with filesystem.open(path, "rb") as file:
                table = pq.read_table(file, columns=list(INDEX_COLUMNS))
        except FileNotFoundError as error:
            raise LodesetError(f"{url} does not exist: run write_shards first") from error
        except pa.ArrowException as error:
            raise LodesetError(f"{url} is no index with the columns {', '.join(INDEX_COLUMNS)}: {error}") from error
        names = table["shard"].combine_chunks().dictionary_encode()
        folder = path.rsplit("/", 1)[0]
        columns["shard"].append(names.indices.to_numpy(zero_copy_only=False).astype(np.int32) + len(shards))
        # `../<folder>/<shard>` is one of an earlier run; object stores do not resolve it.
        paths = (posixpath.normpath(f"{folder}/{name}") for name in names.dictionary.to_pylist())
        shards += [filesystem.unstrip_protocol(path) for path in paths]
        columns["offset"].append(table["offset"].to_numpy().astype(np.int64))
        columns["size_bytes"].append(table["size_bytes"].to_numpy().astype(np.int32))
        columns["image_id"].append(_parse_ids(table["image_id"], url))
    ids = np.concatenate(columns["image_id"]).astype(np.uint8)
    high, low = ids.view(">u8").T
    order = np.lexsort((low, high))
    return ShardIndex(
        shards=tuple(shards),
        shard=np.concatenate(columns["shard"])[order].astype(np.int32),
        offset=np.concatenate(columns["offset"])[order].astype(np.int64),
        size_bytes=np.concatenate(columns["size_bytes"])[order].astype(np.int32),
        ids=ids[order],
    )


def _parse_ids(column: pa.ChunkedArray, url: str) -> NDArray[np.uint8]:
    parsed = [np.empty((0, 16), np.uint8)]
    for chunk in column.chunks:
        ids = chunk.to_pylist()
        try:
            raw = bytes.fromhex("".join(ids))
        except (ValueError, TypeError) as error:
            raise LodesetError(f"{url}: an image_id is not 32 hex digits: {error}") from error
        if any(len(image_id) != 32 for image_id in ids):
            raise LodesetError(f"{url}: an image_id is not 32 hex digits")
        parsed.append(np.frombuffer(raw, np.uint8).reshape(-1, 16))
    return np.concatenate(parsed)


@dataclass(frozen=True)
class Order:
    """The order of images: epoch after epoch, each an exact permutation without its last, incomplete global batch."""

    images: int
    batch: int
    seed: int

    def rows(self, step: int) -> NDArray[np.int64]:
        """Index rows of the global batch of a step."""
        epoch, position = divmod(step, self.images // self.batch)
        return self.permutation(epoch)[position * self.batch : (position + 1) * self.batch]

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """All rows in the order of one epoch."""
        return _permutation(self.images, self.seed, epoch)


@lru_cache(maxsize=1)  # steps follow one another: only the epoch that goes on is needed; 10^7 rows take 0.5 s
def _permutation(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = generator(seed, "order", epoch).permutation(images)
    order.setflags(write=False)  # every step reads the same array
    return order


@dataclass(frozen=True)
class Batch:
    """One worker's share of a step; crops are ordered view by view, so that `view(views, b, ...)` splits them."""

    step: int
    image_ids: tuple[str, ...]  # b
    global_crops: Tensor  # [2 b, 3, S, S], uint8
    local_crops: Tensor  # [L b, 3, s, s], uint8
    masks: Tensor  # [2 b, N] bool
    skipped: tuple[str, ...]  # ids of unreadable images that the next ones of the index stand in for

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In memory that a GPU reads by itself, while the step before goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            global_crops=change(self.global_crops),
            local_crops=change(self.local_crops),
            masks=change(self.masks),
        )


class Batches(Dataset["Batch | LodesetError"]):
    """The batches of one worker; item = step.

    Failures are returned, not raised: a loader process would wrap them in its traceback.
    """

    def __init__(self, index: ShardIndex, config: TrainingConfig, rank: int, world_size: int) -> None:
        """Raises LodesetError where the batch does not split evenly or there are too few images for one."""
        if config.batch % world_size:
            raise LodesetError(
                f"batch {config.batch} is not divisible by {world_size} workers: "
                f"use {config.batch // world_size * world_size} or {(config.batch // world_size + 1) * world_size}"
            )
        if config.batch // world_size < 2:
            raise LodesetError(
                f"batch {config.batch} leaves {config.batch // world_size} image to each of {world_size} workers, but "
                f"the metrics of its features need two: use a batch of at least {2 * world_size}"
            )
        if len(index) < config.batch:
            raise LodesetError(
                f"{len(index)} images are fewer than one batch of {config.batch}: "
                "curate more images or lower training.batch"
            )
        self.index = index
        self.config = config
        self.local_batch = config.batch // world_size
        self.first = rank * self.local_batch
        self.order = Order(len(index), config.batch, config.seed)

    def __getitem__(self, step: int) -> "Batch | LodesetError":
        try:
            return self.load(step)
        except LodesetError as error:
            return error

    def load(self, step: int) -> Batch:
        """This worker's share of a step.

        Raises:
            LodesetError: too many unreadable images in a row.
        """
        rows = self.order.rows(step)[self.first : self.first + self.local_batch].tolist()
        images, used, skipped = self._images(rows)
        crops = [
            augment(image, generator(self.config.seed, "crops", step, self.first + i), self.config.crops)
            for i, image in enumerate(images)
        ]
        return Batch(
            step=step,
            image_ids=tuple(self.index.image_id(row) for row in used),
            global_crops=view_major([crop.global_views for crop in crops]),
            local_crops=view_major([crop.local_views for crop in crops]),
            masks=self._masks(step),
            skipped=tuple(skipped),
        )

    def _images(self, rows: list[int]) -> tuple[list[NDArray[np.uint8]], list[int], list[str]]:
        images: list[NDArray[np.uint8]] = []
        used, skipped = [], []
        for row, payload in zip(rows, self.index.read(rows), strict=True):
            image = self._decode(payload)
            candidate = row
            for _ in range(UNREADABLE_IN_A_ROW):
                if image is not None:
                    break
                skipped.append(self.index.image_id(candidate))
                candidate = (candidate + 1) % len(self.index)
                image = self._decode(self.index.read([candidate])[0])
            if image is None:
                shard = self.index.shards[self.index.shard[row]]
                raise LodesetError(
                    f"{UNREADABLE_IN_A_ROW} images in a row are unreadable, from {self.index.image_id(row)} in {shard} "
                    "on: check that the shards are those the index was written for"
                )
            images.append(image)
            used.append(candidate)
        return images, used, skipped

    def _decode(self, payload: bytes | None) -> NDArray[np.uint8] | None:
        if payload is None:
            return None
        try:
            return np.asarray(decode(payload, self.config.max_pixels))
        except Unreadable:
            return None

    def _masks(self, step: int) -> Tensor:
        seed, crops, batch = self.config.seed, self.config.crops, self.config.batch
        side = crops.global_size // self.config.model.patch_size
        counts = mask_counts(generator(seed, "mask_counts", step), 2 * batch, side**2, self.config.masking)
        positions = [view * batch + self.first + i for view in range(2) for i in range(self.local_batch)]
        masks = [block_mask(generator(seed, "masks", step, p), side, side, int(counts[p])) for p in positions]
        return torch.from_numpy(np.stack(masks))


def load_batches(batches: Batches, first_step: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Batches of the steps from `first_step` to the end of the run, prepared by `loader_processes` processes; `pin_memory`: for a GPU.

    Raises:
        LodesetError: too many unreadable images in a row.
    """
    processes = batches.config.loader_processes
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step, batches.config.steps),
        num_workers=processes,
        # fork: the index (32 bytes an image) is shared with the loader processes instead of copied into each.
        multiprocessing_context="fork" if processes else None,
        worker_init_fn=_single_thread,
        pin_memory=pin_memory,
    )
    for item in loader:
        if isinstance(item, LodesetError):
            raise item
        yield item


def _single_thread(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def view_major(views: list[NDArray[np.uint8]]) -> Tensor:
    """Crops [views, 3, S, S] of each of b images -> [views b, 3, S, S], all images' first views first."""
    stacked = np.stack(views, axis=1)  # [views, b, 3, S, S]
    return torch.from_numpy(stacked.reshape(-1, *stacked.shape[2:]))
