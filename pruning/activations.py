"""What the layers that read prunable units take and give, on calibration images, as second moments.

Shapes: B images, P positions of an image (tokens; places of a kernel), c columns of a layer, m outputs.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

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


def unfolded(layer: nn.Module, x: Tensor, images: int) -> Tensor:
    """What a layer takes, one row a position: [B, P, c], from [B, .., c] or packed [B P, c], or maps of a convolution."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(images, -1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2)


def given(layer: nn.Module, y: Tensor, images: int) -> Tensor:
    """What a layer gives, bias included, as `unfolded` orders it: [B, P, m]."""
    return y.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else y.reshape(images, -1, y.shape[-1])


def collect_grams(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Tensor],
    *,
    positions_per_image: int | None,
    seed: int,
    first_image: int = 0,
    outputs_of: nn.Module | None = None,
) -> dict[str, Gram]:
    """Moments of every layer that reads one of the groups, over batches of images [B, 3, height, width], by its name.

    x is what the layer takes in `model`, y is what it gives in `outputs_of`, the dense model, where `model` is pruned in part, else
    in `model` too. One pass in evaluation mode. A worker that starts at image number `first_image` draws the positions that a single
    worker would have drawn, so its moments add up to the same total.

    Raises:
        LodesetError: there are no images.
    """
    names = list(dict.fromkeys(reader.name for group in groups for reader in group.readers))
    dense = model if outputs_of is None else outputs_of
    layers = {name: model.get_submodule(name) for name in names}
    grams: dict[str, Gram] = {}
    image = first_image
    taken: dict[str, list[Tensor]] = {name: [] for name in names}
    gave: dict[str, list[Tensor]] = {name: [] for name in names}

    def take(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: taken[name].append(args[0])

    def give(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, args, y: gave[name].append(y)

    with ExitStack() as stack:
        for one in {model, dense}:
            stack.enter_context(evaluating(one))
        for name in names:
            stack.callback(layers[name].register_forward_pre_hook(take(name)).remove)
            stack.callback(dense.get_submodule(name).register_forward_hook(give(name)).remove)
        for images in batches:
            for one in {model, dense}:
                one(images)
            for name in names:
                # A layer that is called twice has two of each.
                for x, y in zip(taken[name], gave[name], strict=True):
                    rows_x, rows_y = unfolded(layers[name], x, len(images)), given(layers[name], y, len(images))
                    drawn = [
                        sample_positions(image + i, rows_x.shape[1], positions_per_image, seed)
                        for i in range(len(images))
                    ]
                    at = torch.from_numpy(np.stack(drawn)).to(rows_x.device)
                    of = torch.arange(len(images), device=rows_x.device)[:, None]
                    gram = Gram.from_activations(rows_x[of, at].flatten(0, 1), rows_y[of, at].flatten(0, 1))
                    grams[name] = grams[name] + gram if name in grams else gram
                taken[name].clear()
                gave[name].clear()
            image += len(images)
    if image == first_image:
        raise LodesetError("no calibration images: pruning needs some to see what the units do")
    return grams
