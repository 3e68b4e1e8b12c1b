"""Features of labeled target sets, and their accuracies.

Shapes: n images, D width.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pipeline.dag.store import Part, Store
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.tables.vectors import read_vectors, vector_table
from lodeset.training.backbone import Backbone
from lodeset.training.evaluate import knn_accuracy, layered_features
from lodeset.training.labelled import GALLERY, TEST, Target

PUBLISHED_K = (10, 20, 100, 200)  # DINOv2, section 7.1
BATCH = 64


@dataclass(frozen=True)
class Block:
    """A run of a target's images to be processed by one network."""

    key: str
    network: str
    places: tuple[Location, ...]


class Sized(Protocol):
    """An object that knows at which side, in pixels, a network sees images."""

    @property
    def size(self) -> int: ...


Network = TypeVar("Network", bound=Sized)


def feature_worker(
    store: Store,
    stage: str,
    networks: Mapping[str, Network],
    load: Callable[[Network], Backbone],
    max_pixels: int,
) -> Callable[[Block], Part]:
    """Compute the features of blocks with `networks`, loading each network once."""
    torch.set_num_threads(1)
    model_of = functools.lru_cache(maxsize=4)(lambda name: load(networks[name]))

    def work(block: Block) -> Part:
        started = time.time()
        by_place = sorted(block.places, key=lambda p: (p.uri, p.offset, p.member))
        images = (np.asarray(decode(data, max_pixels)) for _, data in read_images(by_place))
        layers = layered_features(model_of(block.network), images, networks[block.network].size, BATCH)
        table = vector_table([p.image_id for p in by_place], layers.reshape(len(layers), -1).astype(np.float16))
        return store.commit_part(
            stage, block.key, {"features": table}, {"images": len(by_place)}, time.time() - started
        )

    return work


def read_features(store: Store, parts: Sequence[Part], ids: Sequence[str], dim: int) -> NDArray[np.float32]:
    """The results of `layered_features`, float32 [n, L + 1, D] in the order of `ids`."""
    stored_ids, matrix = read_vectors(store, [p.files["features"] for p in parts])
    return in_order(stored_ids, matrix, ids).reshape(len(ids), -1, dim)


def in_order(stored_ids: Sequence[str], matrix: NDArray[np.float16], ids: Sequence[str]) -> NDArray[np.float32]:
    """The rows of `ids`, float32."""
    row_of = {image_id: row for row, image_id in enumerate(stored_ids)}
    return np.asarray(matrix[[row_of[i] for i in ids]], dtype=np.float32)


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows scaled to length 1."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def accuracies(target: Target, vectors: NDArray[np.float32]) -> Mapping[str, float]:
    """kNN accuracy of the test images by the gallery, for each published k up to the gallery's size; vectors [n, D] of
    length 1.
    """
    gallery, test = target.rows(GALLERY), target.rows(TEST)
    labels = np.asarray(target.labels)
    possible = [k for k in PUBLISHED_K if k <= len(gallery)] or [len(gallery)]
    return {
        str(k): round(knn_accuracy(vectors[gallery], labels[gallery], vectors[test], labels[test], k), 4)
        for k in possible
    }
