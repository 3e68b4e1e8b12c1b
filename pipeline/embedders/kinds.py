"""The kinds of embedders, and the union of their knobs that the configuration is validated by."""

from __future__ import annotations

import functools
import importlib
import operator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from lodeset.pipeline.embedders import EmbedderKind, Knobs

LISTED = (
    "lodeset.pipeline.embedders.builtin:PATCH_DICTIONARY",
    "lodeset.pipeline.embedders.builtin:ONNX",
    "lodeset.pipeline.embedders.builtin:TORCHSCRIPT",
    "lodeset.pipeline.embedders.builtin:HUGGING_FACE",
    "lodeset.pipeline.embedders.builtin:PRECOMPUTED",
)


def _kind(reference: str) -> EmbedderKind:
    module, _, name = reference.partition(":")
    kind: EmbedderKind = getattr(importlib.import_module(module), name)
    return kind


KINDS = tuple(_kind(reference) for reference in LISTED)
_BY_KNOBS = {kind.knobs: kind for kind in KINDS}


def kind_of(config: Knobs) -> EmbedderKind:
    """The kind whose knobs these are."""
    return _BY_KNOBS[type(config)]


if TYPE_CHECKING:  # a type checker cannot know which kinds are listed
    Embedder = Knobs
else:
    Embedder = Annotated[functools.reduce(operator.or_, (kind.knobs for kind in KINDS)), Field(discriminator="kind")]
