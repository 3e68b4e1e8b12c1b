"""What layers take and give in one forward pass, and what is added to that: found while a model runs, whatever its code.

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
CONSTANT = -1  # stamp of what does not depend on the images; theirs is 0

Rows = Callable[[nn.Module, Tensor], Tensor]  # what a layer takes or gives, at the drawn positions: [R, c] or [R, m]
Event = tuple[str, int, str]  # of a layer: the number of the call, and what was seen of it


@dataclass
class Call:
    """One call of a layer: what it took and gave, and the sum `factor` * y + `added` that this went into."""

    x: Tensor | None  # [R, c], where asked for
    y: Tensor  # [R, m]
    added: Tensor | None = None  # [R, m]
    factor: Tensor | None = None  # [R, m]
    shared: bool = False  # whether something else takes the output too


class _SeenEnough(BaseException):
    """Ends a forward pass whose rest nobody needs; no `except Exception` of a model's keeps it."""


@dataclass
class _Output:
    """A tensor that is `scale` times what a layer gave, but for constants added, as long as nothing has been written into it."""

    layer: nn.Module
    name: str
    number: int
    call: Call
    rank: int
    scale: Tensor | float
    version: int


class _Watch(TorchFunctionMode):
    """Follows the outputs of layers to the sums that they go into.

    Every tensor has a stamp: the last layer of `order` that it depends on. What is added to a layer's output counts if it depends on
    earlier layers alone: of two branches, the later one makes up for the earlier one. Constants as factors or addends are followed
    (LayerScale), everything else ends an output.
    """

    def __init__(self, order: Sequence[str], given: Rows, until: Event | None) -> None:
        super().__init__()
        self.rank = {name: number for number, name in enumerate(order, start=1)}
        self.given, self.until = given, until
        self.last: Event | None = None
        self.stamps, self.outputs = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def returned(self, tensors: Sequence[Tensor]) -> None:
        """What a model returns is taken by somebody."""
        for one in tensors:
            if (of := self._output(one)) is not None:
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
        of = [(one, output) for one in taken if (output := self._output(one)) is not None]
        used, followed = self._used(name, args, kwargs) if of else (None, None)
        out = func(*args, **kwargs)
        made = list(_tensors((out,)))
        written = taken[: name == "__setitem__"]
        for one in (*made, *written):
            # Writing into a view writes into what it is a view of.
            for whole in (one,) if one._base is None else (one, one._base):
                self.stamps[whole] = max(stamp, self._stamp(whole))
        for one, output in of:
            if (made or written) and one is not used and not any(one is new for new in made):
                output.call.shared = True
        if followed is not None and isinstance(out, Tensor) and used is not None and out.shape == used.shape:
            self.outputs[out] = replace(followed, version=out._version)
        return out

    def _used(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, _Output | None]:
        """The output that goes into a sum, which is noted, or is scaled or shifted: then also what comes of it."""
        if len(args) != 2 or kwargs.keys() - {"alpha"}:
            return None, None
        alpha = kwargs.get("alpha", 1)
        for first, (one, other) in ((True, args), (False, args[::-1])):
            of = self._output(one)
            if of is None:
                continue
            constant = isinstance(other, int | float) or (isinstance(other, Tensor) and self._stamp(other) == CONSTANT)
            if constant and name in PRODUCTS:
                return one, replace(of, scale=of.scale * other)
            if constant and first and name in QUOTIENTS:
                return one, replace(of, scale=of.scale / other)
            scale = of.scale if first else of.scale * alpha
            if constant and name in ADDS:
                return one, replace(of, scale=scale)
            if name in ADDS and isinstance(other, Tensor) and other.shape == one.shape and self._stamp(other) < of.rank:
                if of.call.added is not None:  # a second sum
                    of.call.shared = True
                else:
                    factor = torch.as_tensor(scale, dtype=other.dtype, device=other.device).expand(other.shape)
                    of.call.added = self.given(of.layer, other * alpha if first else other)
                    of.call.factor = self.given(of.layer, factor)
                    self._seen((of.name, of.number, "added"))
                return one, None
        return None, None

    def _stamp(self, one: Tensor) -> int:
        return int(self.stamps.get(one, CONSTANT))

    def _output(self, one: Any) -> _Output | None:
        of = self.outputs.get(one) if isinstance(one, Tensor) else None
        return of if of is not None and of.version == one._version else None

    def _seen(self, event: Event) -> None:
        self.last = event
        if event == self.until:
            raise _SeenEnough


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for one in values:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, tuple | list):
            yield from _tensors(one)


def watched(
    model: nn.Module,
    order: Sequence[str],
    names: Sequence[str],
    images: Tensor,
    given: Rows,
    taken: Rows | None = None,
    until: Event | None = None,
) -> tuple[dict[str, list[Call]], Event | None]:
    """The calls of some layers of `order`, in evaluation mode, and the last thing that there was to see of them: given `until`, the forward
    pass stops there.
    """
    calls: dict[str, list[Call]] = {name: [] for name in names}
    watch = _Watch(order, given, until)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            watch.gave(name, y)
            if name in calls:
                x = args[0] if args else kwargs["input"]
                # Rows are copies: what follows may write into a layer's output.
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
