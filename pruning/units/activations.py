"""Second moments of the inputs and outputs of layers that read prunable units, on calibration images.

Shapes: B images, P positions of an image (tokens; places of a kernel), c columns of a layer, m outputs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.units.groups import Group, evaluating
from lodeset.pruning.units.moments import Gram, Indices
from lodeset.pruning.units.residual_sums import Call, Event, watched

NO_IMAGES = "no calibration images: pruning needs images to measure the units on"


def sample_positions(image: int, positions: int, count: int | None, seed: int) -> Indices:
    """Ascending positions at which one image is measured; they depend on the seed and the image's number, not on the
    batches.
    """
    if count is None or count >= positions:
        return np.arange(positions)
    return np.sort(np.random.default_rng((seed, image)).choice(positions, size=count, replace=False))


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input with one row per position, [P, c]: from [.., c], or from maps [.., channels, height, width] of a
    convolution.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2).flatten(0, 1)


def given(layer: nn.Module, y: Tensor) -> Tensor:
    """A layer's output, including the bias, in the order of `unfolded`: [P, m]."""
    return y.flatten(2).transpose(1, 2).flatten(0, 1) if isinstance(layer, nn.Conv2d) else y.reshape(-1, y.shape[-1])


@dataclass(frozen=True)
class Draw:
    """The drawn positions of a batch of images, given the number of its first image: every worker draws the same
    ones.
    """

    first: int
    images: int
    per_image: int | None
    seed: int

    def rows(self, order: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, values: Tensor) -> Tensor:
        """A copy of a layer's input or output in the form of `order` (`unfolded`, `given`) at these positions, image
        after image.
        """
        rows = []
        # Whether tokens are packed or not, the values of one image are contiguous.
        for number, of_one in enumerate(values.reshape(self.images, -1, *values.shape[1:])):
            whole = order(layer, of_one)
            drawn = sample_positions(self.first + number, len(whole), self.per_image, self.seed)
            rows.append(whole[torch.from_numpy(drawn).to(whole.device)])
        return torch.cat(rows)


def collect_grams(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Tensor],
    *,
    positions_per_image: int | None,
    seed: int,
    first_image: int = 0,
) -> dict[str, Gram]:
    """Moments of every layer that reads one of the groups, over batches of images [B, 3, height, width], by layer name.

    x is the layer's input, y its output. One pass in evaluation mode. A worker that starts at image number
    `first_image` draws the positions that a single worker would have drawn, so the moments of all workers add up to the
    same total.

    Raises:
        LodesetError: there are no images.
    """
    grams: dict[str, Gram] = {}
    draw = Draw(first_image, 0, positions_per_image, seed)

    def measure(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            _add(grams, name, draw.rows(unfolded, layer, x), draw.rows(given, layer, y))

        return hook

    names = dict.fromkeys(reader.name for group in groups for reader in group.readers)
    handles = [model.get_submodule(n).register_forward_hook(measure(n), with_kwargs=True) for n in names]
    try:
        with evaluating(model):
            for images in batches:
                draw = replace(draw, first=draw.first + draw.images, images=len(images))
                model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not draw.images:
        raise LodesetError(NO_IMAGES)
    return grams


@dataclass(frozen=True)
class Behind:
    """Moments of a layer's input in a partially pruned model: with the layer's output in the dense model (`dense`), and
    with the output that it would need so that the sum to which its output is added equals the dense model's sum
    (`needed`).
    """

    dense: Gram
    needed: Gram


def collect_behind(
    cut: nn.Module,
    dense: nn.Module,
    order: Sequence[str],
    names: Sequence[str],
    batches: Iterable[Tensor],
    *,
    positions_per_image: int | None,
    seed: int,
) -> dict[str, Behind]:
    """Moments of layers in a partially pruned copy of the dense model, by name.

    `order`: all layers that are rewritten, one after the other. If a layer's output is added to a residual stream and
    used nowhere else, the layer also has to restore what the stream lost before (as in He et al. 2017,
    arXiv:1707.06168, where the last layer of a branch compensates for its shortcut). All drawn positions of a batch are
    held in memory for these layers.

    Raises:
        LodesetError: there are no images, or the two models call a layer a different number of times.
    """
    grams: dict[str, Gram] = {}
    draw = Draw(0, 0, positions_per_image, seed)
    # The first batch shows when a forward pass has reached everything needed, and which outputs go into sums.
    until: Event | None = None
    lacking: set[tuple[str, int]] = set()
    for images in batches:
        first = not draw.images
        draw = replace(draw, first=draw.first + draw.images, images=len(images))
        given_at, taken_at = partial(draw.rows, given), partial(draw.rows, unfolded)
        expected, last = watched(dense, order, names, images, given_at, None, until)
        pruned, _ = watched(cut, order, names, images, given_at, taken_at, until)
        for name in names:
            if not len(expected[name]) == len(pruned[name]) > 0:
                raise LodesetError(
                    f"{name}: called {len(expected[name])} times in the dense model and {len(pruned[name])} times in "
                    "the pruned one for the same "
                    "images: prune in one pass (mode: one_pass)"
                )
            for number, (dense_call, pruned_call) in enumerate(zip(expected[name], pruned[name], strict=True)):
                if (
                    first
                    and dense_call.added is not None
                    and pruned_call.added is not None
                    and not (dense_call.shared or pruned_call.shared)
                ):
                    lacking.add((name, number))
                if (name, number) in lacking and (dense_call.added is None or pruned_call.added is None):
                    raise LodesetError(
                        f"{name}: what its output is added to depends on the images: prune in one pass (mode: one_pass)"
                    )
                lost = (
                    _lost(dense_call, pruned_call) if (name, number) in lacking else torch.zeros(1, dtype=torch.float64)
                )
                assert pruned_call.x is not None
                y = dense_call.y.double()
                _add(grams, name, pruned_call.x, torch.cat([y, y + lost.to(y.device)], dim=1))
        until = last
    if not draw.images:
        raise LodesetError(NO_IMAGES)
    half = {name: gram.xy.shape[1] // 2 for name, gram in grams.items()}
    return {
        name: Behind(gram.outputs(slice(half[name])), gram.outputs(slice(half[name], None)))
        for name, gram in grams.items()
    }


def _lost(dense: Call, cut: Call) -> Tensor:
    """The change of a layer's output for which the sum equals the dense one, [R, m] in float64; 0 where its factor is
    0.
    """
    assert dense.added is not None and cut.added is not None and cut.factor is not None
    factor = cut.factor.double()
    return torch.where(factor == 0.0, 0.0, (dense.added.double() - cut.added.double()) / factor)


def _add(grams: dict[str, Gram], name: str, x: Tensor, y: Tensor) -> None:
    gram = Gram.from_activations(x, y)
    grams[name] = grams[name] + gram if name in grams else gram
