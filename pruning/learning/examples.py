"""Training images for the search for masks: two views of each, which depend only on the seed and the step.

Shapes: b images per step, S side in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.reading import read_images
from lodeset.training.augment import augment, normalised
from lodeset.training.config import CropsConfig
from lodeset.training.labelled import GALLERY, Target
from lodeset.training.order import Order, generator


class Images(Protocol):
    """A random-access collection of encoded images, such as a `ShardIndex`."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> list[bytes | None]: ...


class Batches(Protocol):
    """Training data: normalized views [2, b, 3, S, S] and classes [b] of every step; implemented by `Examples`."""

    def at(self, step: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Gallery:
    """The labeled images of a target set, encoded and in memory (tens of thousands: evaluation reads all of them
    too).
    """

    data: tuple[bytes, ...]
    codes: NDArray[np.int64]
    classes: int

    def __len__(self) -> int:
        return len(self.data)

    def read(self, rows: Sequence[int]) -> list[bytes | None]:
        return [self.data[row] for row in rows]


def gallery_of(target: Target) -> Gallery:
    """The images in which evaluation looks up neighbors; classes are numbered in the sorted order of all labels of the
    set.
    """
    names, codes = np.unique(np.asarray(target.labels), return_inverse=True)
    rows = target.rows(GALLERY)
    by_place = sorted(
        rows, key=lambda row: (target.places[row].uri, target.places[row].offset, target.places[row].member)
    )
    data = tuple(encoded for _, encoded in read_images([target.places[row] for row in by_place]))
    return Gallery(data, codes[by_place].astype(np.int64), len(names))


@dataclass(frozen=True, eq=False)
class Examples:
    """Batches of `images`; `codes` [n] are their classes, or None. `batch` images per step, or fewer if there are not
    as many.
    """

    images: Images
    codes: NDArray[np.int64] | None
    crops: CropsConfig
    batch: int
    seed: int
    max_pixels: int

    @cached_property
    def order(self) -> Order:
        return Order(len(self.images), max(1, min(self.batch, len(self.images))), self.seed)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalized views [2, b, 3, S, S] and classes [b] (-1: none) of a step; unreadable images are left out.

        Raises:
            LodesetError: fewer than two images of the batch can be read.
        """
        if len(self.images) < 2:
            raise LodesetError(f"{len(self.images)} images to train on: give at least two")
        rows = self.order.rows(step).tolist()
        views, codes = [], []
        for place, (row, data) in enumerate(zip(rows, self.images.read(rows), strict=True)):
            try:
                image = np.asarray(decode(data or b"", self.max_pixels))
            except Unreadable:
                continue
            views.append(augment(image, generator(self.seed, "crops", step, place), self.crops).global_views)
            codes.append(-1 if self.codes is None else int(self.codes[row]))
        if len(views) < 2:
            raise LodesetError(
                f"only {len(views)} of a batch of {len(rows)} images can be read: check them, or give more"
            )
        pixels = torch.from_numpy(np.stack(views, axis=1))  # [2, b, 3, S, S]
        return normalised(pixels.flatten(0, 1)).view(pixels.shape), torch.tensor(codes)
