"""Masks: which weights of a network's convolutions and linear layers are used. Biases, norms and positions are never
masked.

Shapes: a mask has the shape of its weight.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.at_random import random_scores

Masks = dict[str, Tensor]  # bool, by parameter name
FORMAT = "lodeset masks 1"


@dataclass(frozen=True)
class Overlap:
    """How similar two masks are: the weights that both keep, as a share of those that either keeps (Jaccard), and the
    value expected for random masks that keep as many weights in every layer.
    """

    jaccard: float
    by_chance: float


def maskable(network: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers, by name; a weight that two layers share appears once."""
    weights = {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    own = dict(network.named_parameters())
    return {name: weight for name, weight in weights.items() if name in own}


def everything(network: nn.Module) -> Masks:
    return {
        name: torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        for name, weight in maskable(network).items()
    }


def by_magnitude(network: nn.Module, masks: Masks, share: float, scope: Literal["global", "layer"]) -> Masks:
    """Of the weights that `masks` keep, keep those of largest magnitude until the share `share` of all weights is left,
    over all layers or in each.

    No layer loses its last weight. Among equal magnitudes, later weights (in layer order, then within a layer) are
    dropped first.
    """
    weights = {name: parameter.detach() for name, parameter in maskable(network).items()}
    sizes = {name: weights[name].abs().masked_fill(~mask, -1.0) for name, mask in masks.items()}
    if scope == "layer":
        return {name: _largest(sizes[name], round(mask.numel() * share)) for name, mask in masks.items()}
    together = torch.cat([size.flatten() for size in sizes.values()])
    kept = _largest(together, round(together.numel() * share))
    parts = torch.split(kept, [size.numel() for size in sizes.values()])
    return {
        name: part.view_as(size) if part.any() else _largest(size, 1)
        for (name, size), part in zip(sizes.items(), parts, strict=True)
    }


def _largest(sizes: Tensor, count: int) -> Tensor:
    flat = sizes.flatten()
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[torch.argsort(flat, descending=True, stable=True)[: max(1, count)]] = True
    return kept.view_as(sizes)


def at_random(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """Random masks that keep as many weights in every layer as `masks`, drawn by the seed and the layer's name; smaller
    ones are subsets.
    """
    drawn = {}
    for name, mask in masks.items():
        scores = torch.from_numpy(random_scores(mask.numel(), name, seed)).view_as(mask)
        drawn[name] = _largest(scores, int(mask.sum()))
    return drawn


def density(masks: Mapping[str, Tensor]) -> float:
    """The share of the maskable weights that is kept."""
    return float(sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values()))


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Overlap:
    """The overlap of two masks of the same layers."""
    both = sum(int((first[name] & second[name]).sum()) for name in first)
    either = sum(int((first[name] | second[name]).sum()) for name in first)
    expected = sum(int(first[name].sum()) * int(second[name].sum()) / first[name].numel() for name in first)
    total = sum(int(first[name].sum()) + int(second[name].sum()) for name in first)
    return Overlap(both / either, expected / (total - expected))


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, their names and shapes."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha256.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


@torch.no_grad()
def cut(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the masked weights to 0."""
    weights = maskable(network)
    for name, mask in masks.items():
        weights[name].mul_(mask)


def save_masks(path: Path, masks: Mapping[str, Tensor], of: str) -> None:
    """Write a safetensors file with one bit per weight; `of` is the digest of the network that the masks are for
    (`digest_of`).
    """
    packed = {name: torch.from_numpy(np.packbits(mask.flatten().cpu().numpy())) for name, mask in masks.items()}
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    save_file(packed, path, {"format": FORMAT, "of": of, "shapes": shapes})


def load_masks(path: Path) -> tuple[Masks, str]:
    """Read what `save_masks` wrote: the masks, and the digest of the weights that they are for.

    Raises:
        LodesetError: the file is missing or contains something else.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"format is {header.get('format')!r}, not {FORMAT!r}")
            shapes = json.loads(header["shapes"])
            masks = {}
            for name, shape in shapes.items():
                packed, count = file.get_tensor(name), int(np.prod(shape, dtype=np.int64))
                if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
                    raise ValueError(f"{name} has {tuple(packed.shape)} {packed.dtype} for {count} weights")
                bits = np.unpackbits(packed.numpy(), count=count).astype(np.bool_)
                masks[name] = torch.from_numpy(bits).view(shape)
            return masks, str(header["of"])
    except Exception as error:  # a file may contain anything
        raise LodesetError(f"{path} does not hold masks: {type(error).__name__}: {error}") from error
