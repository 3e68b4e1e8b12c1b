"""Vision Transformer of DINOv2 (arXiv:2304.07193, section 4; registers: arXiv:2309.16588).

Parameter names and shapes are those of the released checkpoints, so that their weights load unchanged.

Shapes: B batch, N patches, R registers, T = 1 + R + N tokens, D width, H attention heads.

Crops of several sizes pass through the blocks together (DINOv2, section 5, "sequence packing"): all their tokens form
one tensor [n, D], where n is the sum of B x T over the groups of crops. Layers that treat every token alike (norms,
linear layers) process it as a whole; only attention processes one group after the other.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lodeset.training.backbone import Backbone, Features
from lodeset.training.config import ModelConfig

NORM_EPS = 1e-6
# Up to this many tokens per crop, attention in bf16 on a CPU multiplies matrices one by one: forward and backward take
# a third of the time of PyTorch's flash attention in fp32, and a seventh of it in bf16 (2.13; 17 and 65 tokens, heads
# of 64 channels).
EXPLICIT_TOKENS = 512

Shapes = Sequence[tuple[int, int]]  # (B, T) of each group of crops


class PatchEmbed(nn.Module):
    """Linear embedding of square patches: [B, 3, height, width] -> [B, N, D]."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        embedded: Tensor = self.proj(images)
        return embedded.flatten(2).transpose(1, 2)


def _inner(recomputed: bool, function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """`function(*arguments)`; `recomputed`: only its arguments are stored for the backward pass. It must not draw
    random numbers.
    """
    if recomputed and torch.is_grad_enabled():
        out: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return out
    return function(*arguments)


class Attention(nn.Module):
    """Multi-head self-attention within each crop: [n, D] -> [n, D]."""

    recomputed = False

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        return _inner(self.recomputed, self._mixed, x, shapes)

    def _mixed(self, x: Tensor, shapes: Shapes) -> Tensor:
        parts = self.qkv(x).split([batch * tokens for batch, tokens in shapes])  # [B T, 3 D] each
        mixed = [self._attend(part, *shape) for part, shape in zip(parts, shapes, strict=True)]
        out: Tensor = self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        return out

    def _attend(self, projected: Tensor, batch: int, tokens: int) -> Tensor:
        """[B T, 3 D] -> [B T, D]."""
        # Split before the heads are separated: gradients come back as one concatenation instead of three copies.
        query, key, value = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in projected.chunk(3, dim=1)
        )
        if projected.device.type == "cpu" and projected.dtype == torch.bfloat16 and tokens <= EXPLICIT_TOKENS:
            weights = (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1)  # [B, H, T, T]
            mixed: Tensor = weights @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)  # [B, H, T, D / H]
        return mixed.transpose(1, 2).reshape(batch * tokens, -1)


class Mlp(nn.Module):
    """Two-layer feed-forward network with GELU: [..., D] -> [..., D]."""

    recomputed = False

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return _inner(self.recomputed, self._layers, x)

    def _layers(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGlu(nn.Module):
    """Gated feed-forward network (Shazeer 2020, arXiv:2002.05202): [..., D] -> [..., D]."""

    recomputed = False

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return _inner(self.recomputed, self._layers, x)

    def _layers(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """Learned gain per channel (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block; during training, the share `drop_path` of the samples skips each residual branch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.drop_path = config.drop_path
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, config.heads)
        self.ls1 = LayerScale(dim, config.layerscale)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = (Mlp if config.ffn == "mlp" else SwiGlu)(dim, config.hidden)
        self.ls2 = LayerScale(dim, config.layerscale)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Process the tokens [n, D] of groups of crops; x is overwritten."""
        x = self._add(x, shapes, self.attention_branch)
        return self._add(x, shapes, self.mlp_branch)

    def attention_branch(self, x: Tensor, shapes: Shapes) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(x), shapes))
        return out

    def mlp_branch(self, x: Tensor, shapes: Shapes) -> Tensor:
        out: Tensor = self.ls2(self.mlp(self.norm2(x)))
        return out

    def _add(self, x: Tensor, shapes: Shapes, branch: Callable[[Tensor, Shapes], Tensor]) -> Tensor:
        """x plus its residual, computed only for a random subset of each group and scaled to the same mean."""
        if not self.training or self.drop_path == 0:
            return x + branch(x, shapes)
        places, counts, first = [], [], 0
        for batch, tokens in shapes:
            kept = max(int(batch * (1 - self.drop_path)), 1)
            rows = torch.randperm(batch, device=x.device)[:kept]
            places.append(first + (rows[:, None] * tokens + torch.arange(tokens, device=x.device)).flatten())
            counts.append(kept)
            first += batch * tokens
        kept_shapes = [(kept, tokens) for kept, (_, tokens) in zip(counts, shapes, strict=True)]
        residual = branch(x.index_select(0, torch.cat(places)), kept_shapes).to(x.dtype)
        for rows, part, kept, (batch, _) in zip(
            places, residual.split([len(rows) for rows in places]), counts, shapes, strict=True
        ):
            x = x.index_add_(0, rows, part, alpha=batch / kept)  # in place: nothing stores x for the backward pass
        return x


class DinoVisionTransformer(Backbone):
    """The backbone. `image_size` is the side, in pixels, that the position embedding is stored for; it is interpolated
    for others.

    `config` and `image_size` stay readable as attributes.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, image_size: int) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        dim, patches = config.dim, (image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        # Released models without registers have no such key.
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, dim)) if config.registers else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_groups(self, groups: Sequence[tuple[Tensor, Tensor | None]]) -> list[Features]:
        """Sides are multiples of the patch."""
        embedded = [self._tokens(images, masks) for images, masks in groups]
        shapes = [(tokens.shape[0], tokens.shape[1]) for tokens in embedded]
        x = torch.cat([tokens.flatten(0, 1) for tokens in embedded])  # [n, D]
        for block in self.blocks:
            x = block(x, shapes)
        x = self.norm(x)
        parts = x.split([batch * tokens for batch, tokens in shapes])
        return [self._features(part.view(*shape, -1)) for part, shape in zip(parts, shapes, strict=True)]

    def layer_of(self, name: str) -> int:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.config.depth + 1 if name.startswith("norm.") else 0

    def last_layers(self, images: Tensor, count: int) -> list[Features]:
        """The outputs of each of the last `count` blocks (or of all blocks) for images [B, 3, height, width], through
        the last LayerNorm, the last block last.
        """
        x = self._tokens(images, None)
        batch, tokens, _ = x.shape
        x, seen = x.flatten(0, 1), []
        for number, block in enumerate(self.blocks):
            x = block(x, [(batch, tokens)])
            if number >= len(self.blocks) - count:
                seen.append(self._features(self.norm(x).view(batch, tokens, -1)))
        return seen

    def _features(self, x: Tensor) -> Features:
        """[B, T, D] after the last LayerNorm."""
        first_patch = 1 + self.config.registers
        return Features(cls=x[:, 0], registers=x[:, 1:first_patch], patches=x[:, first_patch:])

    def _tokens(self, images: Tensor, masks: Tensor | None) -> Tensor:
        """[B, 3, height, width] -> [B, T, D]."""
        x = self.patch_embed(images)  # [B, N, D]
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.positions(images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        return x

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embedding for a grid of rows x columns patches, [1, 1 + rows * columns, D], bicubic.

        As in the released models: without registers by scale factor with an offset of 0.1 and no antialias, with
        registers by size with antialias.
        """
        return self.interpolated(self.pos_embed, rows, columns)

    def interpolated(self, stored: Tensor, rows: int, columns: int) -> Tensor:
        """`positions` for an embedding [1, 1 + side^2, D] that is stored for another grid than this network's."""
        side = round((stored.shape[1] - 1) ** 0.5)
        if rows == columns == side:
            return stored
        grid = stored[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if self.register_tokens is None:
            scale = ((rows + 0.1) / side, (columns + 0.1) / side)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        else:
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(stored.dtype)
        return torch.cat([stored[:, :1], patches], dim=1)
