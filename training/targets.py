"""Labelled target sets as evaluation sees them: which images are the gallery, which are the test, and their features.

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

from pipeline import records
from pipeline.algorithms.images import decode
from pipeline.dag.store import Artifact, Part, Store
from pipeline.errors import LodesetError
from pipeline.sources.metadata import field_of
from pipeline.sources.reading import Location, read_images
from pipeline.stages.embed import read_vectors, vector_table
from training.evaluate import knn_accuracy, layered_features
from training.vit import DinoVisionTransformer

GALLERY, TEST = "gallery", "test"
PUBLISHED_K = (10, 20, 100, 200)  # DINOv2, section 7.1
BATCH = 64


@dataclass(frozen=True)
class Target:
    """One target set: its images in the order of their ids, with label and split."""

    name: str
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    splits: tuple[str, ...]
    places: tuple[Location, ...]

    def rows(self, split: str) -> list[int]:
        return [row for row, found in enumerate(self.splits) if found == split]


def read_target(store: Store, ingested: Artifact, name: str, label: str, split: str) -> tuple[Target, dict[str, int]]:
    """The labelled images of a target set, and how many of the others were left out, by reason.

    Raises:
        LodesetError: no gallery or no test image; says which splits and fields there are.
    """
    said = {
        row["image_id"]: row
        for row in reversed(store.table(ingested.tables.get("metadata", ()), None, records.METADATA).to_pylist())
    }
    places: dict[str, Location] = {}
    columns = ["image_id", "uri", "member", "offset", "size_bytes"]
    for row in store.table(ingested.tables["locations"], columns).to_pylist():
        places.setdefault(row["image_id"], Location(**row))
    left_out = {"no_label": 0, "other_split": 0}
    chosen: list[tuple[str, str, str]] = []
    splits: dict[str | None, int] = {}
    for image_id in sorted(places):
        row = said.get(image_id, {})
        its_label, its_split = field_of(row, label), field_of(row, split)
        splits[its_split] = splits.get(its_split, 0) + 1
        if its_split not in (GALLERY, TEST):
            left_out["other_split"] += 1
        elif its_label is None:
            left_out["no_label"] += 1
        else:
            chosen.append((image_id, its_label, its_split))
    for needed in (GALLERY, TEST):
        if not any(found == needed for _, _, found in chosen):
            told = ", ".join(f"{n} x {s!r}" for s, n in splits.items())
            raise LodesetError(
                f"target set `{name}`: no labelled image has {split} = {needed!r} ({split}: {told}): check its `label:` and `split:`"
            )
    ids, labels, found_splits = (tuple(column) for column in zip(*chosen, strict=True))
    target = Target(name, ids, labels, found_splits, tuple(places[i] for i in ids))
    return target, {reason: n for reason, n in left_out.items() if n}


@dataclass(frozen=True)
class Block:
    """A run of a target's images, to be seen by one network."""

    key: str
    network: str
    places: tuple[Location, ...]


class Sized(Protocol):
    """Says at which side, in pixels, a network sees images."""

    @property
    def size(self) -> int: ...


Network = TypeVar("Network", bound=Sized)


def feature_worker(
    store: Store,
    stage: str,
    networks: Mapping[str, Network],
    load: Callable[[Network], DinoVisionTransformer],
    max_pixels: int,
) -> Callable[[Block], Part]:
    """Makes the features of blocks by `networks`, loading each once."""
    torch.set_num_threads(1)
    model_of = functools.lru_cache(maxsize=4)(lambda name: load(networks[name]))

    def work(block: Block) -> Part:
        started = time.time()
        by_place = sorted(block.places, key=lambda p: (p.uri, p.offset, p.member))
        images = (np.asarray(decode(data, max_pixels)) for _, data in read_images(by_place))
        found = layered_features(model_of(block.network), images, networks[block.network].size, BATCH)
        table = vector_table([p.image_id for p in by_place], found.reshape(len(found), -1).astype(np.float16))
        return store.commit_part(
            stage, block.key, {"features": table}, {"images": len(by_place)}, time.time() - started
        )

    return work


def read_features(store: Store, parts: Sequence[Part], ids: Sequence[str], dim: int) -> NDArray[np.float32]:
    """What `layered_features` gave, float32 [n, L + 1, D] in the order of `ids`."""
    found, matrix = read_vectors(store, [p.files["features"] for p in parts])
    return in_order(found, matrix, ids).reshape(len(ids), -1, dim)


def in_order(found: Sequence[str], matrix: NDArray[np.float16], ids: Sequence[str]) -> NDArray[np.float32]:
    """The rows of `ids`, float32."""
    row_of = {image_id: row for row, image_id in enumerate(found)}
    return np.asarray(matrix[[row_of[i] for i in ids]], dtype=np.float32)


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of length 1 each."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def accuracies(target: Target, vectors: NDArray[np.float32]) -> Mapping[str, float]:
    """kNN accuracy of the test images by the gallery, for each published k that the gallery can give; vectors [n, D] of length 1."""
    gallery, test = target.rows(GALLERY), target.rows(TEST)
    labels = np.asarray(target.labels)
    possible = [k for k in PUBLISHED_K if k <= len(gallery)] or [len(gallery)]
    return {
        str(k): round(knn_accuracy(vectors[gallery], labels[gallery], vectors[test], labels[test], k), 4)
        for k in possible
    }
