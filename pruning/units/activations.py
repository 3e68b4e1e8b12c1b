"""What the layers that read prunable units take and give, on calibration images, as second moments.

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

NO_IMAGES = "no calibration images: pruning needs some to see what the units do"


def sample_positions(image: int, positions: int, count: int | None, seed: int) -> Indices:
    """Positions of one image to measure at, ascending; the seed and the image's number decide, not the batches."""
    if count is None or count >= positions:
        return np.arange(positions)
    return np.sort(np.random.default_rng((seed, image)).choice(positions, size=count, replace=False))


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer takes, one row a position, [P, c]: from [.., c], or from maps [.., channels, height, width] of a convolution."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2).flatten(0, 1)


def given(layer: nn.Module, y: Tensor) -> Tensor:
    """What a layer gives, bias included, as `unfolded` orders it: [P, m]."""
    return y.flatten(2).transpose(1, 2).flatten(0, 1) if isinstance(layer, nn.Conv2d) else y.reshape(-1, y.shape[-1])


@dataclass(frozen=True)
class Draw:
    """The positions of a batch of images, the first of which has a number: drawn alike whichever worker has the batch."""

    first: int
    images: int
    per_image: int | None
    seed: int

    def rows(self, order: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, values: Tensor) -> Tensor:
        """What `order` (`unfolded`, `given`) makes of a layer's input or output, at these positions; an image after the other. A copy."""
        rows = []
        # Packed or not, what belongs to an image lies together.
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
    """Moments of every layer that reads one of the groups, over batches of images [B, 3, height, width], by its name.

    x is what the layer takes, y what it gives. One pass in evaluation mode. A worker that starts at image number `first_image` draws the
    positions that a single worker would have drawn, so its moments add up to the same total.

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
    """Moments of what a layer takes in a model that is pruned in part: with what it gives in the dense model, and with what it would have
    to give there so that the sum which its output goes into is the dense one.
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
    """Moments of layers in a copy of the dense model that is pruned in part, by name.

    `order`: all layers that are rewritten, one after the other. Where a layer's output is added to a residual stream, and goes nowhere else, what
    the stream has lost before is what the layer lacks (as He et al. 2017, arXiv:1707.06168, have the last layer of a branch make up for
    its shortcut). All drawn positions of a batch are held, for the layers asked for.

    Raises:
        LodesetError: there are no images, or the two models call a layer a different number of times.
    """
    grams: dict[str, Gram] = {}
    draw = Draw(0, 0, positions_per_image, seed)
    # The first batch says when a forward pass has shown everything, and which outputs go into sums.
    until: Event | None = None
    lacking: set[tuple[str, int]] = set()
    for images in batches:
        first = not draw.images
        draw = replace(draw, first=draw.first + draw.images, images=len(images))
        given_at, taken_at = partial(draw.rows, given), partial(draw.rows, unfolded)
        expected, last = watched(dense, order, names, images, given_at, None, until)
        found, _ = watched(cut, order, names, images, given_at, taken_at, until)
        for name in names:
            if not len(expected[name]) == len(found[name]) > 0:
                raise LodesetError(
                    f"{name}: called {len(expected[name])} times in the dense model and {len(found[name])} times in the pruned one for the same "
                    "images: prune in one pass (mode: one_pass)"
                )
            for number, (one, other) in enumerate(zip(expected[name], found[name], strict=True)):
                if first and one.added is not None and other.added is not None and not (one.shared or other.shared):
                    lacking.add((name, number))
                if (name, number) in lacking and (one.added is None or other.added is None):
                    raise LodesetError(
                        f"{name}: what its output is added to depends on the images: prune in one pass (mode: one_pass)"
                    )
                lost = _lost(one, other) if (name, number) in lacking else torch.zeros(1, dtype=torch.float64)
                assert other.x is not None
                y = one.y.double()
                _add(grams, name, other.x, torch.cat([y, y + lost.to(y.device)], dim=1))
        until = last
    if not draw.images:
        raise LodesetError(NO_IMAGES)
    half = {name: gram.xy.shape[1] // 2 for name, gram in grams.items()}
    return {
        name: Behind(gram.outputs(slice(half[name])), gram.outputs(slice(half[name], None)))
        for name, gram in grams.items()
    }


def _lost(dense: Call, cut: Call) -> Tensor:
    """By how much a layer's output would have to grow for the sum to be the dense one, [R, m] in float64; none where its factor is 0."""
    assert dense.added is not None and cut.added is not None and cut.factor is not None
    factor = cut.factor.double()
    return torch.where(factor == 0.0, 0.0, (dense.added.double() - cut.added.double()) / factor)


def _add(grams: dict[str, Gram], name: str, x: Tensor, y: Tensor) -> None:
    gram = Gram.from_activations(x, y)
    grams[name] = grams[name] + gram if name in grams else gram
