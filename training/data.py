"""Read random batches from shards without reading a shard from end to end.

The content of a batch depends only on (seed, step, global batch), not on the number of workers or loader processes, nor
on where a run was interrupted. All randomness is drawn from generators keyed by those numbers and a purpose.

Shapes: b images per worker and step, L local crops, N patches of a global crop.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode, image_id
from lodeset.pipeline.errors import LodesetError
from lodeset.training.augment import Crops, augment
from lodeset.training.cache import ShardCache
from lodeset.training.config import CropsConfig, TrainingConfig
from lodeset.training.distort import distorted_batch, table_of
from lodeset.training.index import ShardIndex
from lodeset.training.masking import block_mask, mask_counts
from lodeset.training.order import Blocks, Floats, Order, generator

UNREADABLE_IN_A_ROW = 100  # replacements that are tried before a run stops


@dataclass(frozen=True)
class Batch:
    """One worker's share of a step; crops are ordered view by view, so that `view(views, b, ...)` splits them."""

    step: int
    image_ids: tuple[str, ...]  # b
    global_crops: Tensor  # [2 b, 3, S, S], uint8
    local_crops: Tensor  # [L b, 3, s, s], uint8
    masks: Tensor  # [2 b, N] bool
    skipped: tuple[str, ...]  # ids of unreadable images, which the next images of the index replace
    distortions: Tensor | None = None  # [(2 + L) b, 12], global crops first, if the device applies the distortions

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Move to pinned memory, which a GPU reads asynchronously during the previous step."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            global_crops=change(self.global_crops),
            local_crops=change(self.local_crops),
            masks=change(self.masks),
            distortions=change(self.distortions) if self.distortions is not None else None,
        )

    def crops(self, config: CropsConfig) -> tuple[Tensor, Tensor]:
        """Global and local crops as the networks get them, uint8."""
        if self.distortions is None:
            return self.global_crops, self.local_crops
        whole, local = self.distortions.split([len(self.global_crops), len(self.local_crops)])
        sigma = config.blur_sigma[1]
        return distorted_batch(self.global_crops, whole, sigma), distorted_batch(self.local_crops, local, sigma)


class Batches(Dataset["Batch | LodesetError"]):
    """The batches of one worker; item = step.

    Failures are returned instead of raised, because a loader process would wrap them in its traceback.
    """

    def __init__(
        self, index: ShardIndex, config: TrainingConfig, rank: int, world_size: int, weights: Floats | None = None
    ) -> None:
        """`weights` [n]: how often an epoch shows each image; by default once.

        Raises:
            LodesetError: the batch does not split evenly, or an epoch has fewer images than one batch.
        """
        if config.batch % world_size:
            raise LodesetError(
                f"batch {config.batch} is not divisible by {world_size} workers: "
                f"use {config.batch // world_size * world_size} or {(config.batch // world_size + 1) * world_size}"
            )
        if config.batch // world_size < 2:
            raise LodesetError(
                f"batch {config.batch} leaves {config.batch // world_size} image for each of {world_size} workers, but "
                f"the feature metrics need two: use a batch of at least {2 * world_size}"
            )
        self.cache = blocks = None
        if config.cache is not None:
            extents, limit = index.extents(), int(config.cache.size_gb * 2**30)
            blocks = Blocks(index.shard, extents, limit // 2) if extents.sum() > limit else None
            self.cache = ShardCache(Path(config.cache.folder), index.shards, extents.tolist())
        self.order = Order(len(index), config.batch, config.seed, weights, blocks)
        if not self.order.steps:
            weighed = "" if weights is None else f" ({len(index)} of them, weighted by training.mix)"
            raise LodesetError(
                f"{self.order.places} images{weighed} are fewer than one batch of {config.batch}: "
                "curate more images or lower training.batch"
            )
        self.index = index
        self.config = config
        self.local_batch = config.batch // world_size
        self.first = rank * self.local_batch

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
        if self.cache is not None:
            now, soon = self.order.shards_at(step) if self.order.blocks else (range(len(self.index.shards)), ())
            self.cache.want(now, soon)
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
            distortions=_view_major_table(crops) if self.config.crops.distort == "device" else None,
        )

    def _images(self, rows: list[int]) -> tuple[list[NDArray[np.uint8]], list[int], list[str]]:
        images: list[NDArray[np.uint8]] = []
        used, skipped = [], []
        for row, payload in zip(rows, self._read(rows), strict=True):
            image = self._decode(payload)
            candidate = row
            for _ in range(UNREADABLE_IN_A_ROW):
                if image is not None:
                    break
                skipped.append(self.index.image_id(candidate))
                candidate = self._after(candidate)
                image = self._decode(self._read([candidate])[0])
            if image is None:
                shard = self.index.shards[self.index.shard[row]]
                raise LodesetError(
                    f"{UNREADABLE_IN_A_ROW} images in a row are unreadable, starting with {self.index.image_id(row)} "
                    f"in {shard}: check that the shards are those that the index was written for"
                )
            images.append(image)
            used.append(candidate)
        return images, used, skipped

    def _after(self, row: int) -> int:
        """The next row of the index that is shown at all."""
        following = (row + 1) % len(self.index)
        weights = self.order.weights
        while weights is not None and not weights[following]:
            following = (following + 1) % len(self.index)
        return following

    def _read(self, rows: list[int]) -> list[bytes | None]:
        """Encoded bytes of index rows, from the cache as far as possible."""
        if self.cache is None:
            return self.index.read(rows)
        payloads = [self._cached(self.cache, row) for row in rows]
        missing = [place for place, data in enumerate(payloads) if data is None]
        for place, data in zip(missing, self.index.read([rows[place] for place in missing]), strict=True):
            payloads[place] = data
        return payloads

    def _cached(self, cache: ShardCache, row: int) -> bytes | None:
        size = int(self.index.size_bytes[row])
        data = cache.read(int(self.index.shard[row]), int(self.index.offset[row]), size)
        return data if data is not None and image_id(data) == self.index.image_id(row) else None

    def _decode(self, payload: bytes | None) -> NDArray[np.uint8] | None:
        if payload is None:
            return None
        try:
            return np.asarray(decode(payload, self.config.max_pixels))
        except Unreadable:
            return None

    def _masks(self, step: int) -> Tensor:
        seed, crops, batch = self.config.seed, self.config.crops, self.config.batch
        side = crops.global_size // self.config.network.patch_size
        counts = mask_counts(generator(seed, "mask_counts", step), 2 * batch, side**2, self.config.masking)
        positions = [view * batch + self.first + i for view in range(2) for i in range(self.local_batch)]
        masks = [block_mask(generator(seed, "masks", step, p), side, side, int(counts[p])) for p in positions]
        return torch.from_numpy(np.stack(masks))


def load_batches(batches: Batches, first_step: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Batches from `first_step` to the end of the run, prepared by `loader_processes` processes; `pin_memory`: for a
    GPU.

    Raises:
        LodesetError: too many unreadable images in a row.
    """
    processes = batches.config.loader_processes
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step, batches.config.steps),
        num_workers=processes,
        # fork: loader processes share the index (32 bytes per image) instead of copying it.
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


def _view_major_table(crops: list[Crops]) -> Tensor:
    """The pending distortions of the crops of b images, [(2 + L) b, 12], in the order of `view_major`."""
    return table_of([crop.pending[view] for view in range(len(crops[0].pending)) for crop in crops])
