"""Record the inputs and outputs of layers in one forward pass and the sums that these outputs are added to, whatever
the model's code.

Shapes: R rows, the drawn positions of all images of a batch; c columns of a layer, m outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lodeset.pruning.units.groups import evaluating, outputs_of

ADDS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
PRODUCTS = {"mul", "mul_", "__mul__", "__imul__", "__rmul__"}
QUOTIENTS = {"div", "div_", "true_divide", "__truediv__", "__itruediv__"}
CONSTANT = -1  # stamp of tensors that do not depend on the images; the images' stamp is 0

Rows = Callable[[nn.Module, Tensor], Tensor]  # a layer's input or output at the drawn positions: [R, c] or [R, m]
Event = tuple[str, int, str]  # layer, number of the call, and the kind of observation


@dataclass
class Call:
    """One call of a layer: its input, its output, and the sum `factor` * y + `added` that the output went into."""

    x: Tensor | None  # [R, c], if requested
    y: Tensor  # [R, m]
    added: Tensor | None = None  # [R, m]
    factor: Tensor | None = None  # [R, m]
    shared: bool = False  # whether the output has other readers too


class _SeenEnough(BaseException):
    """Ends a forward pass once everything needed was seen; a BaseException, so that no `except Exception` in a model
    catches it.
    """


@dataclass
class _Output:
    """A tensor that is `scale` times a layer's output, up to added constants, until something is written into it."""

    layer: nn.Module
    name: str
    number: int
    call: Call
    rank: int
    scale: Tensor | float
    version: int


class _Watch(TorchFunctionMode):
    """Follows the outputs of layers to the sums that they are added to.

    Every tensor has a stamp: the last layer of `order` that it depends on. An addend of a layer's output counts only if
    it depends on earlier layers alone: of two branches, the later one compensates for the earlier one. Constant factors
    and addends are followed (LayerScale); any other operation ends the tracking of an output.
    """

    def __init__(self, order: Sequence[str], given: Rows, until: Event | None) -> None:
        super().__init__()
        self.rank = {name: number for number, name in enumerate(order, start=1)}
        self.given, self.until = given, until
        self.last: Event | None = None
        self.stamps, self.outputs = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def returned(self, tensors: Sequence[Tensor]) -> None:
        """Mark the tensors that the model returned as used."""
        for tensor in tensors:
            if (of := self._output(tensor)) is not None:
                of.call.shared = True

    def gave(self, name: str, y: Tensor) -> None:
        self.stamps[y] = max(self.rank[name], self._stamp(y))

    def called(self, layer: nn.Module, name: str, number: int, call: Call, y: Tensor) -> None:
        self.outputs[y] = _Output(layer, name, number, call, self.rank[name], 1.0, y._version)
        self._seen((name, number, "given"))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        taken = list(_tensors((args, tuple(kwargs.values()))))
        stamp = max(map(self._stamp, taken), default=CONSTANT)
        of = [(tensor, output) for tensor in taken if (output := self._output(tensor)) is not None]
        used, followed = self._used(name, args, kwargs) if of else (None, None)
        out = func(*args, **kwargs)
        made = list(_tensors((out,)))
        written = taken[: name == "__setitem__"]
        for tensor in (*made, *written):
            # Writing into a view writes into its base.
            for whole in (tensor,) if tensor._base is None else (tensor, tensor._base):
                self.stamps[whole] = max(stamp, self._stamp(whole))
        for tensor, output in of:
            if (made or written) and tensor is not used and not any(tensor is new for new in made):
                output.call.shared = True
        if followed is not None and isinstance(out, Tensor) and used is not None and out.shape == used.shape:
            self.outputs[out] = replace(followed, version=out._version)
        return out

    def _used(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, _Output | None]:
        """The output that goes into a sum (which is recorded), or is scaled or shifted (then with the resulting
        `_Output`).
        """
        if len(args) != 2 or kwargs.keys() - {"alpha"}:
            return None, None
        alpha = kwargs.get("alpha", 1)
        for first, (tensor, other) in ((True, args), (False, args[::-1])):
            of = self._output(tensor)
            if of is None:
                continue
            constant = isinstance(other, int | float) or (isinstance(other, Tensor) and self._stamp(other) == CONSTANT)
            if constant and name in PRODUCTS:
                return tensor, replace(of, scale=of.scale * other)
            if constant and first and name in QUOTIENTS:
                return tensor, replace(of, scale=of.scale / other)
            scale = of.scale if first else of.scale * alpha
            if constant and name in ADDS:
                return tensor, replace(of, scale=scale)
            if (
                name in ADDS
                and isinstance(other, Tensor)
                and other.shape == tensor.shape
                and self._stamp(other) < of.rank
            ):
                if of.call.added is not None:  # a second sum
                    of.call.shared = True
                else:
                    factor = torch.as_tensor(scale, dtype=other.dtype, device=other.device).expand(other.shape)
                    of.call.added = self.given(of.layer, other * alpha if first else other)
                    of.call.factor = self.given(of.layer, factor)
                    self._seen((of.name, of.number, "added"))
                return tensor, None
        return None, None

    def _stamp(self, tensor: Tensor) -> int:
        return int(self.stamps.get(tensor, CONSTANT))

    def _output(self, value: Any) -> _Output | None:
        of = self.outputs.get(value) if isinstance(value, Tensor) else None
        return of if of is not None and of.version == value._version else None

    def _seen(self, event: Event) -> None:
        self.last = event
        if event == self.until:
            raise _SeenEnough


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def watched(
    model: nn.Module,
    order: Sequence[str],
    names: Sequence[str],
    images: Tensor,
    given: Rows,
    taken: Rows | None = None,
    until: Event | None = None,
) -> tuple[dict[str, list[Call]], Event | None]:
    """The calls of some layers of `order` in evaluation mode, and the last event that was seen; with `until`, the
    forward pass stops at that event.
    """
    calls: dict[str, list[Call]] = {name: [] for name in names}
    watch = _Watch(order, given, until)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            watch.gave(name, y)
            if name in calls:
                x = args[0] if args else kwargs["input"]
                # Rows are copies: later code may write into a layer's output.
                call = Call(None if taken is None else taken(layer, x), given(layer, y))
                calls[name].append(call)
                watch.called(layer, name, len(calls[name]), call, y)

        return note

    handles = []
    try:
        for name in order:
            handles.append(model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True))
        with evaluating(model), watch:
            watch.stamps[images] = 0
            watch.returned(outputs_of(model(images)))
    except _SeenEnough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls, watch.last
