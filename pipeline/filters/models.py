"""The ONNX files that filters use: how images go into them, and what they are in fingerprints. Loads no network."""

from __future__ import annotations

from typing import Any

from lodeset.pipeline.embedders.config import OnnxEmbedder
from lodeset.pipeline.embedders.models import identity
from lodeset.pipeline.filters.config import Classifier, Faces

FACES_KEY = "filter.faces"


def classifier_key(config: Classifier) -> str:
    """The classifier's place in the configuration."""
    return f"filter.classifiers ({config.name})"


def classifier_network(config: Classifier) -> OnnxEmbedder:
    """The part that classifiers share with embedders: the file, and how pixels go in."""
    return OnnxEmbedder(
        kind="onnx", path=config.path, size=config.size, mean=config.mean, std=config.std, batch=config.batch
    )


def classifier_identity(config: Classifier) -> dict[str, Any]:
    """What scores depend on: the model's bytes, how pixels go in and which number comes out; no threshold."""
    return {
        **identity(classifier_network(config), classifier_key(config)),
        **config.model_dump(include={"output", "index", "activation"}),
    }


def detector_network(config: Faces) -> OnnxEmbedder:
    return OnnxEmbedder(kind="onnx", path=config.path, size=config.size, mean=config.mean, std=config.std, batch=1)


def detector_identity(config: Faces) -> dict[str, Any]:
    """What the blurred images depend on: the model's bytes and every knob but its place."""
    return {
        **identity(detector_network(config), FACES_KEY),
        **config.model_dump(include={"boxes", "threshold", "expand"}),
    }
