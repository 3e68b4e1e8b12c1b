"""How useful the features of any network are on labeled target sets.

Features are the first output of a network, flattened: the CLS token of a transformer. Shapes: n images, D width.
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
    """Accuracies by target set: kNN by k, and a linear probe."""

    knn: dict[str, dict[str, float]]
    linear: dict[str, float]


def batched(pixels: Iterable[NDArray[np.uint8]]) -> Iterator[torch.Tensor]:
    """Normalized batches [b, 3, S, S] of square images [3, S, S]."""
    for batch in in_batches(pixels, BATCH):
        yield normalised(torch.from_numpy(np.stack(batch)))


def seen(network: nn.Module, pixels: Iterable[NDArray[np.uint8]]) -> torch.Tensor:
    """Features [n, D] of square images [3, S, S]."""
    with evaluating(network):
        features = [features_of(network, images) for images in batched(pixels)]
    return torch.cat(features) if features else torch.empty(0, 0)


def output_change(outputs: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean square difference between outputs [n, D], over the variance of the expected ones; infinite or NaN if these
    do not vary.
    """
    expected = expected.double()
    return float((outputs.double() - expected).square().mean() / expected.var(dim=0, correction=0).mean())


def features_on(network: nn.Module, target: Target, size: int, max_pixels: int) -> NDArray[np.float32]:
    """Features [n, D] of a target's images, scaled to length 1; each image is its center square at `size` pixels."""
    by_place = sorted(target.places, key=lambda p: (p.uri, p.offset, p.member))  # read each file sequentially
    images = (np.asarray(decode(data, max_pixels)) for _, data in read_images(by_place))
    features = F.normalize(seen(network, (centre_square(image, size) for image in images)).float(), dim=1).numpy()
    row_of = {place.image_id: row for row, place in enumerate(by_place)}
    return np.asarray(features[[row_of[image_id] for image_id in target.ids]])


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
