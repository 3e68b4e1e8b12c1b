"""What the layers that read prunable units take and give, on calibration images, as second moments.

Shapes: B images, P positions of an image (tokens; places of a kernel), c columns of a layer, m outputs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import LodesetError
from pruning.groups import Group, evaluating
from pruning.moments import Gram, Indices


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


def collect_grams(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Tensor],
    *,
    positions_per_image: int | None,
    seed: int,
    first_image: int = 0,
    dense: nn.Module | None = None,
) -> dict[str, Gram]:
    """Moments of every layer that reads one of the groups, over batches of images [B, 3, height, width], by its name.

    x is what the layer takes, y what it gives: in `dense`, where `model` is a copy of it that is pruned in part. One pass in
    evaluation mode. A worker that starts at image number `first_image` draws the positions that a single worker would have drawn, so
    its moments add up to the same total. An image's positions are unfolded by themselves, so that memory does not grow with the batch.

    Raises:
        LodesetError: there are no images.
    """
    grams: dict[str, Gram] = {}
    image, count = first_image, 0

    def measure(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            if dense is not None:
                y = expected[name].pop(0)
            # Packed or not, what belongs to an image lies together.
            xs, ys = (one.reshape(count, -1, *one.shape[1:]) for one in (x, y))
            rows_x, rows_y = [], []
            for number, (of_x, of_y) in enumerate(zip(xs, ys, strict=True)):
                whole_x, whole_y = unfolded(layer, of_x), given(layer, of_y)
                drawn = sample_positions(image + number, len(whole_x), positions_per_image, seed)
                at = torch.from_numpy(drawn).to(x.device)
                rows_x.append(whole_x[at])
                rows_y.append(whole_y[at])
            gram = Gram.from_activations(torch.cat(rows_x), torch.cat(rows_y))
            grams[name] = grams[name] + gram if name in grams else gram

        return hook

    names = dict.fromkeys(reader.name for group in groups for reader in group.readers)
    expected: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [model.get_submodule(n).register_forward_hook(measure(n), with_kwargs=True) for n in names]
    if dense is not None:
        handles += [
            dense.get_submodule(n).register_forward_hook(lambda _m, _a, y, n=n: expected[n].append(y)) for n in names
        ]
    try:
        with evaluating(model), evaluating(dense if dense is not None else model):
            for images in batches:
                count = len(images)
                if dense is not None:
                    dense(images)
                model(images)
                image += count
    finally:
        for handle in handles:
            handle.remove()
    if image == first_image:
        raise LodesetError("no calibration images: pruning needs some to see what the units do")
    return grams
