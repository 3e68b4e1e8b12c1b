"""Evaluate frozen features by weighted k-nearest-neighbor classification (Wu et al. 2018, arXiv:1805.01978).

Shapes: n images, g gallery rows, q queries, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lodeset.pipeline.errors import LodesetError
from lodeset.training.augment import normalised
from lodeset.training.backbone import Backbone

LAYERS = 4  # number of last blocks whose CLS tokens the linear probe uses
QUERIES_AT_ONCE = 1024  # limits the similarity matrix in memory


def features(model: Backbone, images: Iterable[NDArray[np.uint8]], size: int, batch: int) -> NDArray[np.float32]:
    """L2-normalized CLS features [n, D] of RGB images [height, width, 3] of any sizes.

    The shorter side is resized to `size` pixels (bicubic), and the center square is used; `size` must be a multiple of
    the patch size.

    Raises:
        LodesetError: `size` is not a multiple of the patch size.
    """
    return _seen(model, images, size, batch, lambda pixels: F.normalize(model(pixels).cls.float(), dim=-1))


def layered_features(
    model: Backbone, images: Iterable[NDArray[np.uint8]], size: int, batch: int
) -> NDArray[np.float32]:
    """[n, L + 1, D]: CLS of the last L blocks (4, or all of a smaller model), then the mean patch of the last block."""
    count = min(LAYERS, model.config.depth)

    def seen(pixels: Tensor) -> Tensor:
        layers = model.last_layers(pixels, count)
        return torch.stack([*(layer.cls for layer in layers), layers[-1].patches.mean(dim=1)], dim=1).float()

    return _seen(model, images, size, batch, seen)


def _seen(
    model: Backbone,
    images: Iterable[NDArray[np.uint8]],
    size: int,
    batch: int,
    look: Callable[[Tensor], Tensor],
) -> NDArray[np.float32]:
    patch = model.config.patch_size
    if size % patch:
        nearest = max(patch, size // patch * patch)
        raise LodesetError(f"evaluation size {size} is not a multiple of patch size {patch}: use {nearest}")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    batches = []
    with torch.inference_mode():
        for group in in_batches(images, batch):
            pixels = torch.from_numpy(np.stack([centre_square(image, size) for image in group])).to(device)
            batches.append(look(normalised(pixels)).cpu().numpy())
    model.train(training)
    return np.concatenate(batches) if batches else np.empty((0, model.config.dim), np.float32)


def knn(
    gallery: NDArray[np.float32],
    gallery_labels: Sequence[str] | NDArray[np.generic],
    queries: NDArray[np.float32],
    k: int,
    temperature: float = 0.07,
) -> NDArray[np.generic]:
    """Labels [q] by a vote of the k most similar gallery rows, each with weight exp(cosine / temperature).

    gallery [g, D] and queries [q, D] are L2-normalized. Ties go to the label that sorts first.

    Raises:
        LodesetError: k is not between 1 and g.
    """
    if not 1 <= k <= len(gallery):
        raise LodesetError(f"k = {k} neighbors of {len(gallery)} gallery images: use 1 to {len(gallery)}")
    classes, codes = np.unique(np.asarray(gallery_labels), return_inverse=True)
    predicted = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        similarity = queries[start : start + QUERIES_AT_ONCE] @ gallery.T  # [queries, g]
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        weights = np.exp(np.take_along_axis(similarity, nearest, axis=1).astype(np.float64) / temperature)
        votes = np.zeros((len(similarity), len(classes)))
        np.add.at(votes, (np.arange(len(similarity))[:, None], codes[nearest]), weights)
        predicted[start : start + len(similarity)] = votes.argmax(axis=1)
    return classes[predicted]


def knn_accuracy(
    gallery: NDArray[np.float32],
    gallery_labels: Sequence[str] | NDArray[np.generic],
    queries: NDArray[np.float32],
    query_labels: Sequence[str] | NDArray[np.generic],
    k: int,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose voted label (see `knn`) is correct."""
    return float(np.mean(knn(gallery, gallery_labels, queries, k, temperature) == np.asarray(query_labels)))


def in_batches(images: Iterable[NDArray[np.uint8]], size: int) -> Iterator[list[NDArray[np.uint8]]]:
    """`size` images at a time, fewer at the end."""
    remaining = iter(images)
    while group := list(islice(remaining, size)):
        yield group


def centre_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The center square of an image, resized: [3, size, size]."""
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    square = Image.fromarray(image).resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side), reducing_gap=3.0
    )
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
