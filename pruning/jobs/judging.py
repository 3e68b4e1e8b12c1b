"""What the features of any network are worth on labelled target sets.

Features are what a network returns first, flattened: the CLS token of a transformer. Shapes: n images, D width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pipeline.sources.reading import read_images
from lodeset.pruning.learning.tasks import features_of
from lodeset.pruning.units.groups import evaluating
from lodeset.training.augment import normalised
from lodeset.training.evaluate import centre_square, in_batches
from lodeset.training.labelled import GALLERY, TEST, Target
from lodeset.training.linear import linear_probe
from lodeset.training.targets import accuracies

BATCH = 32
PROBE_STEPS = 500


@dataclass(frozen=True)
class Judged:
    """Accuracies by target set: kNN by k, and of a linear probe."""

    knn: dict[str, dict[str, float]]
    linear: dict[str, float]


def batched(pixels: Iterable[NDArray[np.uint8]]) -> Iterator[torch.Tensor]:
    """Normalised [b, 3, S, S] of squares [3, S, S]."""
    for some in in_batches(pixels, BATCH):
        yield normalised(torch.from_numpy(np.stack(some)))


def seen(network: nn.Module, pixels: Iterable[NDArray[np.uint8]]) -> torch.Tensor:
    """Features [n, D] of squares [3, S, S]."""
    with evaluating(network):
        found = [features_of(network, images) for images in batched(pixels)]
    return torch.cat(found) if found else torch.empty(0, 0)


def output_change(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean square difference of outputs [n, D], over the variance of those expected; infinite or NaN where these do not vary."""
    expected = expected.double()
    return float((found.double() - expected).square().mean() / expected.var(dim=0, correction=0).mean())


def features_on(network: nn.Module, target: Target, size: int, max_pixels: int) -> NDArray[np.float32]:
    """Features [n, D] of a target's images, each the centre square at `size` pixels, of length 1."""
    by_place = sorted(target.places, key=lambda p: (p.uri, p.offset, p.member))  # each file from its start to its end
    images = (np.asarray(decode(data, max_pixels)) for _, data in read_images(by_place))
    found = F.normalize(seen(network, (centre_square(image, size) for image in images)).float(), dim=1).numpy()
    row_of = {place.image_id: row for row, place in enumerate(by_place)}
    return np.asarray(found[[row_of[image_id] for image_id in target.ids]])


def knn_of(network: nn.Module, targets: Sequence[Target], size: int, max_pixels: int) -> dict[str, dict[str, float]]:
    """kNN accuracy on every target set, by k."""
    return {t.name: dict(accuracies(t, features_on(network, t, size, max_pixels))) for t in targets}


def judged(network: nn.Module, targets: Sequence[Target], size: int, max_pixels: int, seed: int) -> Judged:
    knn: dict[str, dict[str, float]] = {}
    linear: dict[str, float] = {}
    for target in targets:
        vectors = features_on(network, target, size, max_pixels)
        knn[target.name] = dict(accuracies(target, vectors))
        inputs: Mapping[str, NDArray[np.float32]] = {"features": vectors * np.float32(vectors.shape[1] ** 0.5)}
        probe = linear_probe(inputs, target.labels, target.rows(GALLERY), target.rows(TEST), PROBE_STEPS, seed)
        linear[target.name] = round(probe.accuracy, 4)
    return Judged(knn, linear)
