"""ONNX files as classifiers: NSFW, watermark, aesthetics, ... B images, C numbers an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.embedders import onnx
from lodeset.pipeline.embedders.preprocess import normalised
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.filters import Floats, Measure
from lodeset.pipeline.filters.config import Classifier
from lodeset.pipeline.filters.models import classifier_key, classifier_network


def classifier(config: Classifier, threads: int) -> Measure:
    """What makes an image the network's input [3, size, size], and the scores, float32 [B], of any number of these.

    Raises:
        LodesetError: the file is missing or broken, it is not a network of images to numbers, it does not say which of
            several outputs or numbers is meant, or it gives a score that is no finite number.
    """
    model = onnx.opened(classifier_network(config), threads, classifier_key(config), _told(config))
    output = _output(config, model.outputs)
    model = onnx.settled(model, [output])

    def scores(inputs: Sequence[Floats]) -> Floats:
        found = []
        for start in range(0, len(inputs), config.batch):
            batch = np.stack(inputs[start : start + config.batch])
            (out,) = model.run(batch, [output])
            found.append(_scores(out, len(batch), config))
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    return Measure(lambda image: normalised(image, model.recipe), scores)


def _told(config: Classifier) -> str:
    return f"the classifier {config.name} ({config.path})"


def _output(config: Classifier, names: Sequence[str]) -> str:
    if config.output is None and len(names) == 1:
        return names[0]
    if config.output is None:
        raise LodesetError(f"{_told(config)} has the outputs {', '.join(names)}: say which with `output`")
    if config.output not in names:
        raise LodesetError(f"{_told(config)} has no output {config.output}; there are: {', '.join(names)}")
    return config.output


def _scores(out: NDArray[Any], images: int, config: Classifier) -> Floats:
    """The network's numbers [B, C] or [B] -> scores [B]."""
    if out.ndim not in (1, 2) or out.shape[0] != images or not np.issubdtype(out.dtype, np.floating):
        raise LodesetError(
            f"{_told(config)} gives {out.dtype} {list(out.shape)} for {images} images; a classifier gives one number, or C, "
            f"for each: float [{images}, C]"
        )
    numbers = out.reshape(images, -1).astype(np.float64)
    many = numbers.shape[1]
    if config.index is None and many != 1:
        raise LodesetError(f"{_told(config)} gives {many} numbers for each image: say which is the score with `index`")
    index = config.index or 0
    if index >= many:
        raise LodesetError(f"{_told(config)} gives {many} numbers for each image, and has no index {index}")
    if config.activation == "softmax":
        if many == 1:
            raise LodesetError(
                f"{_told(config)} gives one number for each image, whose softmax is always 1: use sigmoid"
            )
        raised = np.exp(numbers - numbers.max(axis=1, keepdims=True))
        numbers = raised / raised.sum(axis=1, keepdims=True)
    elif config.activation == "sigmoid":
        numbers = 0.5 * (1 + np.tanh(numbers / 2))  # does not overflow
    scores = numbers[:, index].astype(np.float32)
    if not np.isfinite(scores).all():
        bad = scores[~np.isfinite(scores)][0]
        raise LodesetError(
            f"{_told(config)} gives the score {bad}, which cannot be compared with a threshold: check size, mean and std, "
            "or whether the file is sound"
        )
    return scores
