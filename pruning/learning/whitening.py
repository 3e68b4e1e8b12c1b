"""Train weights in a basis in which their layers' inputs are white: W = s V P, where P is the inverse square root of
the inputs' second moments, s is the standard deviation of the outputs, and V is trained.

Correlations between neighboring pixels and channels make a loss far steeper in some directions than in others, and
AdamW, which scales each number separately, is then slow along the flat ones. (Desjardins et al. 2015, arXiv:1507.00210,
also center the inputs and measure them again during training. Here training starts close to its end, so measuring once
is enough.) A learning rate is relative to a layer's output.

Shapes: c columns of a layer, m outputs, R measured rows (positions of all images).
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

POSITIONS = 16  # per image
DAMPING = (
    1e-3  # share of the mean second moment that is added to all: directions that inputs hardly use stay as they are
)
ROWS = 4  # minimum per column: with fewer, directions that were missed by chance would look unused
COLUMNS = 4_096  # maximum: the matrix root of this many takes 25 s and .4 GB
CONSTANT = 1e-8  # variance of outputs that counts as rounding, as a share of their mean square


@dataclass(frozen=True)
class InputMoments:
    """A layer's input statistics: the means of x x^T [c, c] and of x [c], in float64, the number of their rows, and the
    rows of a whole batch.
    """

    squares: Tensor
    mean: Tensor
    rows: int
    rows_a_batch: int


class _White(nn.Module):
    """Map V [m, c, ...] to W."""

    into: Tensor  # s P, [c, c]

    def __init__(self, into: Tensor) -> None:
        super().__init__()
        self.register_buffer("into", into)

    def forward(self, v: Tensor) -> Tensor:
        with torch.autocast(v.device.type, enabled=False):  # bf16 would not restore the original weights
            return (v.flatten(1) @ self.into).view_as(v)


@contextmanager
def whitened(network: nn.Module, batches: Iterable[Tensor], seed: int) -> Iterator[None]:
    """Within this context, V is the parameter of the network's linear layers and convolutions; afterwards their weights
    are W again.

    Left unchanged: grouped convolutions; layers that share weights, or whose weights are derived or coarser than
    float32; layers with more columns than COLUMNS, than positions in a batch (a step would take twice as long) or than
    can be measured (ROWS); and layers whose outputs do not vary.

    batches: images [B, 3, height, width] on which the layers' inputs are measured.
    """
    ties = tied(network)
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if type(layer) in (nn.Linear, nn.Conv2d)  # subclasses may use their weights differently
        and getattr(layer, "groups", 1) == 1
        and name not in ties
        and layer.weight.dtype in (torch.float32, torch.float64)
        and layer.weight[0].numel() <= COLUMNS
    }
    done = []
    try:
        measured = moments_of(network, layers, batches, seed)
        for name in list(measured):
            moments = measured.pop(name)  # all moments and all roots together would not fit in memory
            columns = len(moments.mean)
            scale = _deviation(layers[name].weight, moments)
            if scale is not None and columns <= min(moments.rows // ROWS, moments.rows_a_batch):
                done.append(layers[name])
                _whiten(layers[name], moments, scale)
        yield
    finally:
        for layer in done:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _whiten(layer: nn.Module, moments: InputMoments, scale: float) -> None:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    squares = moments.squares
    squares.diagonal().add_(DAMPING * squares.diagonal().mean())
    values, vectors = torch.linalg.eigh(squares)
    v = weight.detach().flatten(1).double() @ (vectors * values.sqrt() @ vectors.T) / scale
    into = vectors * values.rsqrt() @ vectors.T * scale
    parametrize.register_parametrization(layer, "weight", _White(into.to(weight)))
    layer.parametrizations.weight.original.data.copy_(v.view_as(weight))  # type: ignore[union-attr, operator]


def _deviation(weight: Tensor, moments: InputMoments) -> float | None:
    """Standard deviation of a layer's outputs (root of the mean variance), or None if they do not vary."""
    rows = weight.detach().flatten(1).double()
    square = float(((rows @ moments.squares) * rows).sum() / len(rows))
    variance = square - float((rows @ moments.mean).square().sum() / len(rows))
    return math.sqrt(variance) if math.isfinite(variance) and variance > CONSTANT * square else None


def moments_of(
    network: nn.Module, layers: Iterable[str], batches: Iterable[Tensor], seed: int
) -> dict[str, InputMoments]:
    """The layers' input statistics over images [B, 3, height, width], by name; layers that are not called are
    missing.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    rows: dict[str, int] = {}
    most: dict[str, int] = {}
    of_batch: dict[str, int] = {}
    seen = 0  # images before this batch

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if not x.numel():
            return
        if isinstance(
            layer, nn.Conv2d
        ):  # one map at a time: the kernels' inputs at all positions would not fit in memory
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
    return {n: InputMoments(sums[n][0].div_(rows[n]), sums[n][1].div_(rows[n]), rows[n], most[n]) for n in sums}


def _positions(layer: nn.Conv2d, maps: Tensor) -> int:
    """Number of positions of the kernel on one map."""
    return len(unfolded(layer, maps[:1]))
