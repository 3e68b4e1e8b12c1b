"""What every backbone can do; the rest of training, evaluation and pruning speaks to this alone.

Shapes: B images, N patches, R registers, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lodeset.training.backbones.kind import Architecture, kind_of


@dataclass(frozen=True)
class Features:
    """What a backbone makes of a batch: cls [B, D] of each image, patches [B, N, D], registers [B, R, D]."""

    cls: Tensor
    patches: Tensor
    registers: Tensor


class Backbone(nn.Module):
    """A network from images to features. `lodeset.training.vit` has the default, `docs/extending.md` shows how to add one.

    The module that makes patches of pixels is called `patch_embed`: it has a learning rate of its own (`optimiser.patch_embed_lr`).

    Attributes:
        config: its settings; a checkpoint's backbone is built again from them.
        image_size: the side in pixels that it was built for.
    """

    config: Architecture
    image_size: int

    def forward_groups(self, groups: Sequence[tuple[Tensor, Tensor | None]]) -> list[Features]:
        """Features of several batches of images [B, 3, height, width], each of its own size, with masks [B, N] bool: True patches are hidden."""
        raise NotImplementedError

    def last_layers(self, images: Tensor, count: int) -> list[Features]:
        """Features after each of the last `count` blocks (fewer where there are fewer), the last block last."""
        raise NotImplementedError

    def layer_of(self, name: str) -> int:
        """How deep a parameter lies: 0 before the blocks, 1 to `config.depth` in them, `config.depth` + 1 after them."""
        raise NotImplementedError

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Features:
        return self.forward_groups([(images, masks)])[0]


def made(config: Architecture, image_size: int) -> Backbone:
    return kind_of(config).build(config, image_size)
