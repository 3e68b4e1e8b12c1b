"""Images -> vectors. An embedder is a function from a list of RGB images to float32 [B, D], created once per worker.

A new kind is an `EmbedderKind` in a file of its own and one line in `kinds.LISTED` (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lodeset.pipeline.dag.fingerprint import file_digest
from lodeset.pipeline.strict import Strict

Embed = Callable[[Sequence[Image.Image]], NDArray[np.float32]]

# Knobs that say where the model lies or how fast it runs, not what it computes.
_PLACES = ("path", "model", "revision", "batch")


class Knobs(Strict):
    """What the configuration says of an embedder. `kind` tells the kinds apart: a literal in each."""

    kind: str


def knobs_of(config: Knobs) -> dict[str, Any]:
    """The knobs that decide what is computed."""
    return {name: value for name, value in config.model_dump().items() if name not in _PLACES}


def identity_by_file(config: Any) -> Mapping[str, Any]:
    """The knobs that decide what is computed, and the digest of the bytes at `path`, if there is such a knob."""
    path = getattr(config, "path", None)
    return knobs_of(config) | ({"model": file_digest(path)} if path is not None else {})


@dataclass(frozen=True, kw_only=True)
class EmbedderKind:
    """One kind of embedder.

    Attributes:
        knobs: its section of the configuration.
        load: makes the embedding function of a worker with so many threads.
        identity: what enters fingerprints. It raises OSError where the model is not there.
        name: what messages and manifests call it.
        on_gpu: whether the installed libraries would run it on a GPU, if its worker has one.
        pinned: the knobs with the model made unmistakable.
    """

    knobs: type[Knobs]
    load: Callable[[Any, int], Embed]
    identity: Callable[[Any], Mapping[str, Any]] = identity_by_file
    name: Callable[[Any], str] = lambda config: getattr(config, "path", config.kind)
    on_gpu: Callable[[], bool] = lambda: False
    pinned: Callable[[Any], Knobs] = lambda config: config
