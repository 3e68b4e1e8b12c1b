"""Weights in a basis in which what their layers take is white: W = s V P, where P is the inverse square root of the second moments of the
inputs, s the standard deviation of the outputs, and V is trained.

What neighbouring pixels and channels share makes a loss far steeper in some directions than in others, and AdamW, which scales every
number by itself, then goes slowly along the others. (Desjardins et al. 2015, arXiv:1507.00210, who also centre inputs and measure them again
while they train. Here what is trained starts near to where it ends: once is enough.) A learning rate means the same in layers of any scale.

Shapes: c columns of a layer, m outputs.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pruning.activations import Draw, sample_positions, unfolded
from pruning.groups import evaluating, tied

POSITIONS = 16  # of an image
DAMPING = 1e-3  # of the mean second moment, added to all: directions that inputs hardly take stay as they are
COLUMNS = 5_000  # the root of more takes minutes, and each step longer than the layer itself: these layers stay in their own basis


class _White(nn.Module):
    """V [m, c, ...] to W."""

    root: Tensor  # s P^-1, [c, c], float64
    inverse: Tensor  # P

    def __init__(self, weight: Tensor, moments: Tensor, scale: float) -> None:
        super().__init__()
        damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)
        values, vectors = torch.linalg.eigh(damped)
        self.register_buffer("root", vectors * values.sqrt() @ vectors.T / scale)
        self.register_buffer("inverse", (vectors * values.rsqrt() @ vectors.T * scale).to(weight))

    def forward(self, v: Tensor) -> Tensor:
        with torch.autocast(v.device.type, enabled=False):  # bf16 would not bring back the weights that there were
            return (v.flatten(1) @ self.inverse).view_as(v)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return (weight.detach().flatten(1).double() @ self.root).to(weight).view_as(weight)


@contextmanager
def whitened(network: nn.Module, batches: Iterable[Tensor], seed: int) -> Iterator[None]:
    """Within it the network's linear layers and convolutions, but for grouped ones and those of more than COLUMNS columns, have V as their
    parameter; afterwards their weights are what V says. Layers that share weights, or whose weights are made of others, stay as they are.

    batches: images [B, 3, height, width] that the layers' inputs are measured on.
    """
    ties = tied(network)
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
        and "weight" in layer._parameters
        and name not in ties
        and layer.weight[0].numel() <= COLUMNS
    }
    done = []
    try:
        for name, (moments, mean) in moments_of(network, layers, batches, seed).items():
            weight = layers[name].weight
            scale = _deviation(weight, moments, mean)
            if math.isfinite(scale) and scale > 0.0:
                parametrize.register_parametrization(layers[name], "weight", _White(weight, moments, scale))
                done.append(layers[name])
        yield
    finally:
        for layer in done:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _deviation(weight: Tensor, moments: Tensor, mean: Tensor) -> float:
    """Of a layer's outputs: the root of their mean variance."""
    rows = weight.detach().flatten(1).double()
    return math.sqrt(max(0.0, float(((rows @ moments) * rows).sum() - (rows @ mean).square().sum()) / len(rows)))


def moments_of(
    network: nn.Module, layers: Iterable[str], batches: Iterable[Tensor], seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The means of x x^T [c, c] and of x [c] of what layers take, in float64; none of layers that are not called."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    rows: dict[str, int] = {}
    seen = 0  # images before this batch

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if isinstance(layer, nn.Conv2d):  # one map after the other, since kernels times positions of all would not fit
            x = x.reshape(-1, *x.shape[-3:])
            x = Draw(seen, len(x), POSITIONS, seed).rows(unfolded, layer, x).double()
        else:
            x = x.reshape(-1, x.shape[-1])
            x = x[sample_positions(seen, len(x), POSITIONS * len(images), seed)].double()
        squares, total = sums.get(name, (0.0, 0.0))
        sums[name] = x.T @ x + squares, x.sum(0) + total
        rows[name] = rows.get(name, 0) + len(x)

    handles = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: note(name, layer, args, kwargs), with_kwargs=True
        )
        for name in layers
    ]
    try:
        with evaluating(network):
            for images in batches:
                network(images)
                seen += len(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (squares / rows[name], total / rows[name]) for name, (squares, total) in sums.items()}
