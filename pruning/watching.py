"""What layers take and give in one forward pass, and what is added to that: found while a model runs, whatever its code.

Shapes: R rows, the drawn positions of all images of a batch; c columns of a layer, m outputs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.groups import evaluating

ADDS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
SCALES = {"mul", "mul_", "__mul__", "__imul__", "__rmul__"}

Rows = Callable[[nn.Module, Tensor], Tensor]  # what a layer takes or gives, at the drawn positions: [R, c] or [R, m]


@dataclass
class Call:
    """One call of a layer: what it took, what it gave, and what its output was added to, in the output's own scale."""

    x: Tensor | None  # [R, c], where asked for
    y: Tensor  # [R, m]
    added: Tensor | None = None  # [R, m]


class _SeenEnough(Exception):
    """Ends a forward pass whose rest nobody needs."""


@dataclass
class _Output:
    """A tensor that is the output of a call times `scale`, as long as nothing has been written into it."""

    call: Call
    layer: nn.Module
    scale: Tensor | float
    made: int  # when the layer gave it
    version: int


class _Watch(TorchFunctionMode):
    """Follows the outputs of layers to the sums that they go into.

    Only what had been computed before a layer was called counts as what its output is added to: of two branches the later one. Factors
    (numbers, and parameters such as LayerScale's) and dropout are followed, everything else ends an output.
    """

    def __init__(self, given: Rows, enough: int | None) -> None:
        super().__init__()
        self.given, self.enough, self.events, self.clock = given, enough, 0, 0
        self.made, self.outputs = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def called(self, layer: nn.Module, call: Call, y: Tensor) -> None:
        self.outputs[y] = _Output(call, layer, 1.0, self.made.get(y, self.clock), y._version)
        self._counted()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        followed = self._followed(name, args, kwargs)
        out = func(*args, **kwargs)
        self.clock += 1
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.made[one] = self.clock
        if followed is not None:
            of, scale = followed
            self.outputs[out] = _Output(of.call, of.layer, of.scale * scale, of.made, out._version)
        return out

    def _followed(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Output, Tensor | float] | None:
        """Notes a sum; of a product, or of dropout, the output that it scales, and by what."""
        if name == "dropout":
            of = self._output(args[0])
            return None if of is None else (of, 1.0)
        if len(args) != 2 or kwargs:
            return None
        for one, other in (args, args[::-1]):
            of = self._output(one)
            if of is None:
                continue
            if name in SCALES and isinstance(other, nn.Parameter | int | float):
                return of, other if isinstance(other, int | float) else other.detach()
            if name in ADDS and isinstance(other, Tensor) and other.shape == one.shape:
                self._added(of, other)
        return None

    def _output(self, one: Any) -> _Output | None:
        of = self.outputs.get(one) if isinstance(one, Tensor) else None
        return of if of is not None and of.version == one._version else None

    def _added(self, of: _Output, other: Tensor) -> None:
        if of.call.added is None and self.made.get(other, 0) < of.made:
            of.call.added = self.given(of.layer, torch.nan_to_num(other / of.scale, posinf=0.0, neginf=0.0))
            self._counted()

    def _counted(self) -> None:
        self.events += 1
        if self.events == self.enough:
            raise _SeenEnough


def watched(
    model: nn.Module,
    names: Iterable[str],
    images: Tensor,
    given: Rows,
    taken: Rows | None = None,
    enough: int | None = None,
) -> tuple[dict[str, list[Call]], int]:
    """The calls of some layers, in evaluation mode, and how many things there were to see; having seen `enough` of them it stops."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    watch = _Watch(given, enough)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            # Rows are copies: what follows may write into a layer's output.
            call = Call(None if taken is None else taken(layer, x), given(layer, y))
            calls[name].append(call)
            watch.called(layer, call, y)

        return note

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in calls]
    try:
        with evaluating(model), watch:
            model(images)
    except _SeenEnough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls, watch.events
