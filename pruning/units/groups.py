"""Find the units of a model that can be removed, and the layers that make and read them.

Torch-Pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900) finds units that depend on one another: hidden
neurons, channels of convolutions, channels that a residual stream couples. Attention heads are found by their layers'
names. A model's output keeps its width, and therefore the embedding of a transformer does too.

Shapes: n units; of a layer that reads them: c columns, one for each value under a kernel.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.units.moments import Indices

Model = TypeVar("Model", bound=nn.Module)

TOLERANCE = 1e-4  # removing units and zeroing them differ only by the order of float32 sums


@dataclass(frozen=True)
class Reader:
    """A layer (nn.Linear or nn.Conv2d) that reads the units, and the unit of each of its columns [c]."""

    name: str
    unit_of: Indices


@dataclass(frozen=True)
class Group:
    """Units that can only be removed together with the rows that make them and the columns that read them.

    makers: names of the layers whose outputs are the units, with the unit of each of their rows. sliced: only these
    rows and columns change with a unit, and the dependency graph does not know the group. heads: the attention module
    if the units are its heads.
    """

    name: str
    units: int
    makers: tuple[Reader, ...]
    readers: tuple[Reader, ...]
    sliced: bool = False
    heads: str | None = None


@dataclass(frozen=True)
class Groups:
    """The prunable groups of a model, in the order in which they are first read, and the reasons why other layers are
    left whole, by name.
    """

    prunable: tuple[Group, ...]
    skipped: dict[str, str]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def outputs_of(out: Any) -> list[Tensor]:
    """The tensors that a model returned: a tensor, or the values of a dataclass, mapping or sequence, at any depth."""
    if isinstance(out, Tensor):
        return [out] if out.numel() else []
    if is_dataclass(out) and not isinstance(out, Mapping):
        out = [getattr(out, f.name) for f in fields(out)]
    if isinstance(out, Mapping):
        out = list(out.values())
    return [tensor for value in out for tensor in outputs_of(value)] if isinstance(out, Sequence) else []


def find_groups(model: nn.Module, example: Tensor) -> Groups:
    """Find the prunable groups of a model; `example` is a batch of two or more images that the model takes.

    Each group is tested: with its first unit removed, a copy must return what it returns with that unit zeroed.

    Raises:
        LodesetError: there is nothing to prune.
    """
    taken, of_one, shares = taken_by(model, example), taken_by(model, example[:1]), tied(model)
    order = {name: number for number, name in enumerate(taken)}
    prunable: list[Group] = []
    skipped: dict[str, str] = {}
    named = [*_attentions(model), *_gated(model)]
    known = {maker.name for group in named for maker in group.makers}
    for group in [*_coupled(model, example, order, skipped, known), *named]:
        together = [member.name for member in (*group.makers, *group.readers)]
        ties = [f"{name} shares weights with {shares[name]}" for name in together if name in shares]
        apart = [
            reader.name
            for reader in group.readers
            if taken.get(reader.name) != len(example) * of_one.get(reader.name, 0)
        ]
        if any(name not in order for name in together):
            reason: str | None = "the model's forward pass does not use all of it"
        elif ties:
            reason = ties[0]
        elif apart:
            reason = f"the input of {apart[0]} does not grow with the number of images"
        else:
            reason = _refusal(model, group, example)
        if reason is None:
            prunable.append(group)
        else:
            skipped[group.name] = reason
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in order:
            skipped[name] = "the model's forward pass does not call it"
    if not prunable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise LodesetError(f"nothing to prune in this model ({reasons})")
    return Groups(
        tuple(sorted(prunable, key=lambda group: min(order[reader.name] for reader in group.readers))), skipped
    )


def graph_of(model: nn.Module, example: Tensor) -> tp.DependencyGraph:
    """Torch-Pruning's dependency graph; the model is left in evaluation mode with gradients enabled, as tracing
    requires.

    Raises:
        LodesetError: the model cannot be traced.
    """
    model.eval().requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside layers, which no kept group contains
        try:
            return tp.DependencyGraph().build_dependency(model, example, output_transform=outputs_of, verbose=False)
        except Exception as error:  # a user's forward pass may raise anything
            raise LodesetError(f"the model's layers cannot be traced: {type(error).__name__}: {error}") from error


def taken_by(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Number of input values of each layer that is called for a batch of images, by name, in the order of the first
    calls.

    Raises:
        LodesetError: the model does not take such images.
    """
    taken: dict[str, int] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken[name] = taken.get(name, 0) + int((args[0] if args else kwargs["input"]).numel())

    handles = [
        module.register_forward_pre_hook(lambda _m, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with evaluating(model):
            model(images)
    except Exception as error:  # a user's forward pass may raise anything
        size = " x ".join(map(str, images.shape[1:]))
        raise LodesetError(
            f"the model does not take images of {size} values: give the size that it was made for "
            f"({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return taken


def tied(model: nn.Module) -> dict[str, str]:
    """Layers whose weight or bias shares memory with another module's parameter: rewriting one would rewrite both."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in (p for p in module.parameters(recurse=False) if p.numel()):
            owners.setdefault(parameter.data_ptr(), set()).add(name or "the model itself")
    return {name: min(names - {name}) for names in owners.values() if len(names) > 1 for name in names}


def _coupled(
    model: nn.Module, example: Tensor, order: Mapping[str, int], skipped: dict[str, str], known: set[str]
) -> Iterator[Group]:
    """Groups of the dependency graph, except those of the makers `known`; the reasons against other groups go into
    `skipped`.
    """
    twin = copy.deepcopy(model)
    names = {module: name for name, module in twin.named_modules()}
    graph = graph_of(twin, example)
    for coupled in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        makers: list[Reader] = []
        readers: list[Reader] = []
        reason: str | None = None
        units = len(coupled[0].idxs)
        for item in coupled:
            module, writes = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
            if isinstance(module, tp.ops._OutputOp):
                reason = "its width is that of what the model returns"
            elif isinstance(module, nn.Linear | nn.Conv2d):
                width = module.weight.shape[0 if writes else 1]
                unit_of = np.full(width, -1)
                traced = max(item.idxs) < width  # otherwise tokens and channels were mixed up
                if traced:
                    unit_of[list(item.idxs)] = list(item.root_idxs)
                if isinstance(module, nn.Conv2d) and module.groups > 1:
                    reason = reason or f"{names[module]} is a grouped convolution"
                elif not traced:
                    reason = reason or f"its channels cannot be traced to {names[module]}"
                elif (unit_of < 0).any():
                    reason = reason or f"{names[module]} also reads other layers' channels"
                kernel = module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) and not writes else 1
                (makers if writes else readers).append(Reader(names[module], np.repeat(unit_of, kernel)))
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.InstanceNorm2d):
                reason = reason or f"{names[module]} normalizes over the units"
            elif module in names and not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.PReLU):
                reason = reason or f"{names[module]} is a {type(module).__name__}, which cannot be rewritten"
        if known & {maker.name for maker in makers}:
            continue
        makers.sort(key=lambda maker: order[maker.name])
        name = " + ".join(maker.name for maker in makers)
        if reason is None and not readers:
            reason = "no layer reads it: its width is that of what the model returns"
        if reason is not None:
            skipped[name] = reason
        else:
            yield Group(name, units, tuple(makers), tuple(readers))


def _attentions(model: nn.Module) -> list[Group]:
    """Heads of the modules that have linear layers `qkv` and `proj` and an attribute `heads` with their number."""
    groups = []
    for name, module in model.named_modules():
        qkv, proj, heads = (getattr(module, key, None) for key in ("qkv", "proj", "heads"))
        if isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int) and heads > 1:
            of_head = np.repeat(np.arange(heads), proj.in_features // heads)
            makers, readers = Reader(f"{name}.qkv", np.tile(of_head, 3)), Reader(f"{name}.proj", of_head)
            groups.append(Group(name, heads, (makers,), (readers,), sliced=True, heads=name))
    return groups


def _gated(model: nn.Module) -> list[Group]:
    """Hidden units of the modules whose linear `w12` outputs gates and values side by side, and whose `w3` reads their
    product.
    """
    groups = []
    for name, module in model.named_modules():
        w12, w3 = getattr(module, "w12", None), getattr(module, "w3", None)
        if isinstance(w12, nn.Linear) and isinstance(w3, nn.Linear) and w12.out_features == 2 * w3.in_features:
            units = np.arange(w3.in_features)
            maker, reader = Reader(f"{name}.w12", np.tile(units, 2)), Reader(f"{name}.w3", units)
            groups.append(Group(maker.name, len(units), (maker,), (reader,), sliced=True))
    return groups


def _refusal(model: nn.Module, group: Group, example: Tensor) -> str | None:
    """Why a group cannot be pruned, or None: one unit is removed from one copy and zeroed in another."""
    if group.units < 2:
        return "it has a single unit"
    keep = np.arange(1, group.units)
    try:
        zeroed = copy.deepcopy(model)
        for reader in group.readers:
            columns(layer_of(zeroed, reader.name))[:, torch.from_numpy(reader.unit_of == 0)] = 0.0
        difference = max_difference(shrunk(zeroed, [(group, keep)], example), zeroed, example)
    except Exception as error:  # a user's forward pass may raise anything
        return f"removing a unit breaks the model: {type(error).__name__}: {str(error).splitlines()[0]}"
    if not difference <= TOLERANCE:
        return f"a unit removed and the same unit zeroed differ by {difference:.2g}: something else depends on it"
    return None


def layer_of(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """The layer called `name`.

    Raises:
        LodesetError: the model has no such layer.
    """
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise LodesetError(f"the model has no linear layer or convolution called {name!r}: find its groups again")
    return layer


def columns(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A layer's weight as a matrix [m, c] that shares its memory, without its gradient; the weight is made
    contiguous.
    """
    if not layer.weight.is_contiguous():  # channels last: a matrix of it would be a copy
        layer.weight.data = layer.weight.data.contiguous()
    return layer.weight.detach().flatten(1)


def max_difference(first: nn.Module, second: nn.Module, images: Tensor) -> float:
    """Largest difference between two models' outputs on images [B, 3, height, width], each as a share of the second's
    largest value; infinite if shapes differ, if a value is not finite, or if integer outputs differ at all.

    Raises:
        LodesetError: the models return no tensor.
    """
    with evaluating(first), evaluating(second):
        of_first, of_second = outputs_of(first(images)), outputs_of(second(images))
    if not of_second:
        raise LodesetError("the model returns no tensor: nothing can be compared")
    return max(map(_difference, of_first, of_second)) if len(of_first) == len(of_second) else math.inf


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    if not b.is_floating_point() or torch.equal(a, b):
        return 0.0 if torch.equal(a, b) else math.inf
    share = ((a - b).abs().max() / b.abs().max()).item()
    return share if math.isfinite(share) else math.inf


def shrunk(model: Model, kept: Sequence[tuple[Group, Indices]], example: Tensor) -> Model:
    """A copy of the model that holds only the kept units of each group (ascending); everything else is unchanged.

    Raises:
        LodesetError: the model cannot be traced.
    """
    small = copy.deepcopy(model)
    training, frozen = model.training, {name for name, p in model.named_parameters() if not p.requires_grad}
    graph = None if all(group.sliced for group, _ in kept) else graph_of(small, example)
    for group, keep in kept:
        if len(keep) == group.units:
            continue
        if group.sliced:
            for member, axis in [(maker, 0) for maker in group.makers] + [(reader, 1) for reader in group.readers]:
                _slice(small, member.name, np.flatnonzero(np.isin(member.unit_of, keep)), axis)
            if group.heads is not None:
                small.get_submodule(group.heads).heads = len(keep)  # type: ignore[assignment]
            continue
        assert graph is not None
        root = layer_of(small, group.makers[0].name)
        prune = tp.prune_conv_out_channels if isinstance(root, nn.Conv2d) else tp.prune_linear_out_channels
        removed = np.setdiff1d(np.arange(group.units), keep)
        graph.get_pruning_group(root, prune, idxs=removed.tolist()).prune()
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return small.train(training)


def _slice(model: nn.Module, name: str, keep: Indices, axis: int) -> None:
    """Keep only some rows (axis 0) or columns (1) of a linear layer."""
    layer = layer_of(model, name)
    assert isinstance(layer, nn.Linear)
    rows = torch.from_numpy(keep)
    layer.weight = nn.Parameter(layer.weight.detach().index_select(axis, rows))
    if axis == 0:
        layer.out_features = len(keep)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[rows])
    else:
        layer.in_features = len(keep)
