"""Masks: which weights of a network's convolutions and linear layers count. All else (biases, norms, positions) is never masked.

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

Masks = dict[str, Tensor]  # bool, by the names of parameters
FORMAT = "lodeset masks 1"


@dataclass(frozen=True)
class Overlap:
    """How alike two masks are: the weights that both keep, as a share of those that either keeps (Jaccard), and what masks that keep
    as many weights in every layer would share if they were drawn at random."""

    jaccard: float
    by_chance: float


def maskable(network: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers, by name; one that two layers share is there once."""
    found = {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    own = dict(network.named_parameters())
    return {name: weight for name, weight in found.items() if name in own}


def everything(network: nn.Module) -> Masks:
    return {
        name: torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        for name, weight in maskable(network).items()
    }


def by_magnitude(network: nn.Module, masks: Masks, share: float, scope: Literal["global", "layer"]) -> Masks:
    """Of the weights that `masks` keep those of largest magnitude, until the share `share` of all is left: of all layers together, or of each.

    No layer loses its last weight. Of equal magnitudes the later one goes, by the layers' order and within a layer.
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
    """Masks that keep as many weights in every layer as `masks`, drawn by the seed and the layer's name; fewer are some of more."""
    drawn = {}
    for name, mask in masks.items():
        scores = torch.from_numpy(random_scores(mask.numel(), name, seed)).view_as(mask)
        drawn[name] = _largest(scores, int(mask.sum()))
    return drawn


def density(masks: Mapping[str, Tensor]) -> float:
    """The share of the maskable weights that is kept."""
    return float(sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values()))


def overlap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Overlap:
    """The masks must be of the same layers."""
    both = sum(int((one[name] & other[name]).sum()) for name in one)
    either = sum(int((one[name] | other[name]).sum()) for name in one)
    expected = sum(int(one[name].sum()) * int(other[name].sum()) / one[name].numel() for name in one)
    total = sum(int(one[name].sum()) + int(other[name].sum()) for name in one)
    return Overlap(both / either, expected / (total - expected))


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, names and shapes."""
    told = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        told.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        told.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


@torch.no_grad()
def cut(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Sets the weights that do not count to 0."""
    weights = maskable(network)
    for name, mask in masks.items():
        weights[name].mul_(mask)


def save_masks(path: Path, masks: Mapping[str, Tensor], of: str) -> None:
    """A safetensors file with a bit a weight; `of` is the digest of the network that they are for (`digest_of`)."""
    packed = {name: torch.from_numpy(np.packbits(mask.flatten().cpu().numpy())) for name, mask in masks.items()}
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    save_file(packed, path, {"format": FORMAT, "of": of, "shapes": shapes})


def load_masks(path: Path) -> tuple[Masks, str]:
    """What `save_masks` wrote, and the digest of the weights that the masks are for.

    Raises:
        LodesetError: there is no such file, or it holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            if told.get("format") != FORMAT:
                raise ValueError(f"format is {told.get('format')!r}, not {FORMAT!r}")
            shapes = json.loads(told["shapes"])
            masks = {}
            for name, shape in shapes.items():
                packed, count = file.get_tensor(name), int(np.prod(shape, dtype=np.int64))
                if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
                    raise ValueError(f"{name} has {tuple(packed.shape)} {packed.dtype} for {count} weights")
                bits = np.unpackbits(packed.numpy(), count=count).astype(np.bool_)
                masks[name] = torch.from_numpy(bits).view(shape)
            return masks, str(told["of"])
    except Exception as error:  # a file may hold anything
        raise LodesetError(f"{path} does not hold masks: {type(error).__name__}: {error}") from error
