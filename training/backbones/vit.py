"""DINOv2's Vision Transformer as a kind of backbone; the network is in `lodeset.training.vit`.

Shapes: D width, T tokens of an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lodeset.pipeline.strict import Strict
from lodeset.training.backbones.kind import BackboneKind

if TYPE_CHECKING:
    from lodeset.training.backbone import Backbone
    from lodeset.training.config import ModelConfig


class VitConfig(Strict):
    """The default; its settings are those of the section `model`."""

    kind: Literal["vit"] = "vit"


def _build(config: ModelConfig, image_size: int) -> Backbone:
    from lodeset.training.vit import DinoVisionTransformer  # loads torch

    return DinoVisionTransformer(config, image_size)


def _parameters(model: ModelConfig, image_size: int) -> int:
    """All but biases and norms (1 % of `tiny`)."""
    patches = (image_size // model.patch_size) ** 2
    embedding = (3 * model.patch_size**2 + patches + 1 + model.registers) * model.dim
    return embedding + 12 * model.dim**2 * model.depth  # 4 D^2 of attention, 8 D^2 of the MLP or SwiGLU


def _macs(model: ModelConfig, image_size: int) -> int:
    """Of the blocks: every token meets 12 D^2 weights, and T others by two products of width D."""
    tokens = (image_size // model.patch_size) ** 2 + 1 + model.registers
    return tokens * (12 * model.dim**2 + 2 * tokens * model.dim) * model.depth


VIT = BackboneKind(config=VitConfig, build=_build, any_size=True, parameters=_parameters, macs=_macs)
