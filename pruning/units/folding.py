"""Fold BatchNorm into the preceding convolutions, so that a layer's output is the next layer's input."""

import copy

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lodeset.pruning.units.groups import TOLERANCE, Model, evaluating, max_difference


def folded(model: Model, example: Tensor) -> Model:
    """A copy of the model, in evaluation mode, in which a BatchNorm that is the only reader of a convolution is folded
    into it.

    A norm that is shared, or whose input has other readers, stays. On `example` [B, 3, height, width], two images or
    more, the copy must return what the model returned.
    """
    whole = copy.deepcopy(model).eval()
    for conv, norm in _pairs(whole, example):
        before, after = whole.get_submodule(conv), whole.get_submodule(norm)
        assert isinstance(before, nn.Conv2d) and isinstance(after, nn.BatchNorm2d)
        tried = copy.deepcopy(whole)
        _put(tried, conv, fuse_conv_bn_eval(before, after))
        _put(tried, norm, nn.Identity())
        if max_difference(tried, whole, example) <= TOLERANCE:
            whole = tried
    return whole


def _pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Pairs of a convolution and the BatchNorm that takes its output tensor, by name."""
    gave: dict[int, str] = {}
    pairs: list[tuple[str, str]] = []
    held: list[Tensor] = []  # keeps tensors alive so that no id is reused

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        held.append(out)
        if isinstance(module, nn.Conv2d):
            gave[id(out)] = name
        elif id(args[0]) in gave and module.running_mean is not None:
            pairs.append((gave[id(args[0])], name))

    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: note(name, m, args, out))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    once = [name for pair in pairs for name in pair]
    return [pair for pair in pairs if all(once.count(name) == 1 for name in pair)]


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, own = path.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
