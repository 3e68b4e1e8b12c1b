"""Weights in a basis in which what their layers take is white: W = s V P, where P is the inverse square root of the second moments of the
inputs, s the standard deviation of the outputs, and V is trained.

What neighbouring pixels and channels share makes a loss far steeper in some directions than in others, and AdamW, which scales every
number by itself, then goes slowly along the others. (Desjardins et al. 2015, arXiv:1507.00210, who also centre inputs and measure them again
while they train. Here what is trained starts near to where it ends: once is enough.) A learning rate is relative to what a layer gives.

Shapes: c columns of a layer, m outputs, R rows that were measured (positions of all images).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lodeset.pruning.units.activations import Draw, sample_positions, unfolded
from lodeset.pruning.units.groups import evaluating, tied

POSITIONS = 16  # of an image
DAMPING = 1e-3  # of the mean second moment, added to all: directions that inputs hardly take stay as they are
ROWS = 4  # a column, at least: of fewer, directions that happen not to be measured would be taken for ones that inputs do not take
COLUMNS = 4_096  # the root of these takes 25 s, and .4 GB
CONSTANT = 1e-8  # variance of outputs that is rounding, as a share of their mean square


@dataclass(frozen=True)
class Taken:
    """What a layer takes: the means of x x^T [c, c] and of x [c], in float64, the rows that they are of, and those of a whole batch."""

    squares: Tensor
    mean: Tensor
    rows: int
    rows_a_batch: int


class _White(nn.Module):
    """V [m, c, ...] to W."""

    into: Tensor  # s P, [c, c]

    def __init__(self, into: Tensor) -> None:
        super().__init__()
        self.register_buffer("into", into)

    def forward(self, v: Tensor) -> Tensor:
        with torch.autocast(v.device.type, enabled=False):  # bf16 would not bring back the weights that there were
            return (v.flatten(1) @ self.into).view_as(v)


@contextmanager
def whitened(network: nn.Module, batches: Iterable[Tensor], seed: int) -> Iterator[None]:
    """Within it V is the parameter of the network's linear layers and convolutions; afterwards their weights are what V says.

    Left as they are: grouped convolutions; layers that share weights, or whose weights are made of others or are coarser than float32; those of
    more columns than COLUMNS, than positions in a batch (a step would take twice as long) or than can be measured (ROWS); and those whose
    outputs do not vary.

    batches: images [B, 3, height, width] that the layers' inputs are measured on.
    """
    ties = tied(network)
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if type(layer) in (nn.Linear, nn.Conv2d)  # others may make something else of their weights
        and getattr(layer, "groups", 1) == 1
        and name not in ties
        and layer.weight.dtype in (torch.float32, torch.float64)
        and layer.weight[0].numel() <= COLUMNS
    }
    done = []
    try:
        measured = moments_of(network, layers, batches, seed)
        for name in list(measured):
            taken = measured.pop(name)  # all of them, and all roots, would not fit
            columns = len(taken.mean)
            scale = _deviation(layers[name].weight, taken)
            if scale is not None and columns <= min(taken.rows // ROWS, taken.rows_a_batch):
                done.append(layers[name])
                _whiten(layers[name], taken, scale)
        yield
    finally:
        for layer in done:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _whiten(layer: nn.Module, taken: Taken, scale: float) -> None:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    squares = taken.squares
    squares.diagonal().add_(DAMPING * squares.diagonal().mean())
    values, vectors = torch.linalg.eigh(squares)
    v = weight.detach().flatten(1).double() @ (vectors * values.sqrt() @ vectors.T) / scale
    into = vectors * values.rsqrt() @ vectors.T * scale
    parametrize.register_parametrization(layer, "weight", _White(into.to(weight)))
    layer.parametrizations.weight.original.data.copy_(v.view_as(weight))  # type: ignore[union-attr, operator]


def _deviation(weight: Tensor, taken: Taken) -> float | None:
    """Of a layer's outputs: the root of their mean variance, if they vary."""
    rows = weight.detach().flatten(1).double()
    square = float(((rows @ taken.squares) * rows).sum() / len(rows))
    variance = square - float((rows @ taken.mean).square().sum() / len(rows))
    return math.sqrt(variance) if math.isfinite(variance) and variance > CONSTANT * square else None


def moments_of(network: nn.Module, layers: Iterable[str], batches: Iterable[Tensor], seed: int) -> dict[str, Taken]:
    """What layers take of images [B, 3, height, width], by name; none of layers that are not called."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    rows: dict[str, int] = {}
    most: dict[str, int] = {}
    of_batch: dict[str, int] = {}
    seen = 0  # images before this batch

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if not x.numel():
            return
        if isinstance(layer, nn.Conv2d):  # one map after the other, since kernels times positions of all would not fit
            maps = x.reshape(-1, *x.shape[-3:])
            x = Draw(seen, len(maps), POSITIONS, seed).rows(unfolded, layer, maps).double()
            whole = len(maps) * _positions(layer, maps)
        else:
            x = x.reshape(-1, x.shape[-1])
            whole = len(x)
            x = x[sample_positions(seen, len(x), POSITIONS * len(images), seed)].double()
        of_batch[name] = of_batch.get(name, 0) + whole
        rows[name] = rows.get(name, 0) + len(x)
        if name in sums:
            sums[name][0].add_(x.T @ x)
            sums[name][1].add_(x.sum(0))
        else:
            sums[name] = x.T @ x, x.sum(0)

    handles = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: note(name, layer, args, kwargs), with_kwargs=True
        )
        for name in layers
    ]
    try:
        with evaluating(network):
            for images in batches:
                of_batch.clear()
                network(images)
                seen += len(images)
                most |= {name: max(most.get(name, 0), count) for name, count in of_batch.items()}
    finally:
        for handle in handles:
            handle.remove()
    return {n: Taken(sums[n][0].div_(rows[n]), sums[n][1].div_(rows[n]), rows[n], most[n]) for n in sums}


def _positions(layer: nn.Conv2d, maps: Tensor) -> int:
    """Of the kernel on one map."""
    return len(unfolded(layer, maps[:1]))
