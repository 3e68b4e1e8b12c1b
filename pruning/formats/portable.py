"""Store models of any origin so that they load without the code that defined them: safetensors, and the graph of their
layers as JSON.

A model is traced (torch.fx) into calls of `torch.nn` layers, of functions and of tensor methods, each from a list of
known ones. Nothing in a file is executed: names are checked, and anything that is not on the lists is refused when
writing and when reading.
"""

import inspect
import json
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from lodeset.pipeline import own
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.units.groups import TOLERANCE, max_difference

WEIGHTS, GRAPH = "model.safetensors", "graph.json"

LAYERS: dict[str, type[nn.Module]] = {
    layer.__name__: layer
    for layer in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm,
        nn.InstanceNorm2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
        nn.Sigmoid, nn.Tanh, nn.Softmax, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
        nn.Dropout, nn.Dropout2d, nn.Identity, nn.Upsample, nn.PixelShuffle, nn.ZeroPad2d, nn.PReLU, nn.Softplus, nn.Hardtanh,
        nn.Unflatten,
    )
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{f.__name__}": f for f in (
        operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.neg, operator.iadd,
        operator.imul, operator.matmul, operator.getitem, operator.pow,
    )},
    **{f"torch.{name}": getattr(torch, name) for name in (
        "relu", "sigmoid", "tanh", "softmax", "log_softmax", "flatten", "reshape", "transpose", "permute", "unsqueeze", "squeeze",
        "cat", "stack", "chunk", "split", "add", "sub", "mul", "div", "matmul", "bmm", "mean", "sum", "max_pool2d", "clamp", "flip", "pow",
        "sqrt", "exp",
    )},
    **{f"F.{name}": getattr(F, name) for name in (
        "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "softmax", "log_softmax", "max_pool2d", "avg_pool2d",
        "adaptive_avg_pool2d", "dropout", "interpolate", "pad", "normalize", "scaled_dot_product_attention",
    )},
}  # fmt: skip
METHODS = frozenset({
    "relu", "sigmoid", "tanh", "softmax", "flatten", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "contiguous",
    "chunk", "split", "add", "mul", "mean", "sum", "size", "expand", "clamp", "flip", "pow", "sqrt", "repeat", "unflatten",
})  # fmt: skip
_NAMES = {function: name for name, function in FUNCTIONS.items()}
PLACES = {"device", "dtype"}  # constructor arguments that are not stored
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def save_portable(model: nn.Module, folder: Path, example: Tensor) -> None:
    """Write `model.safetensors` and `graph.json`; the stored model must return for `example`, a batch of images, what
    the model returns.

    Raises:
        LodesetError: the model computes something that the files cannot describe.
    """
    training = model.training
    try:
        traced = fx.Tracer().trace(model.eval())
    except Exception as error:  # a user's forward pass may raise anything while it is traced
        raise LodesetError(
            f"the model cannot be traced: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        model.train(training)
    layers = {
        str(node.target): model.get_submodule(str(node.target)) for node in traced.nodes if node.op == "call_module"
    }
    tree = {
        "layers": {name: _layer_entry(name, layer) for name, layer in layers.items()},
        "nodes": [_node_entry(node) for node in traced.nodes],
    }
    used = {str(node.target) for node in traced.nodes if node.op == "get_attr"}
    weights = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
        if name in used or name.rpartition(".")[0] in layers
    }
    own.mark(folder, "model")
    (folder / GRAPH).write_text(json.dumps(tree, indent=1) + "\n")
    save_file(weights, folder / WEIGHTS)
    try:
        difference = max_difference(load_portable(folder), model, example)
    except Exception as error:  # a model that differs from its trace may raise anything
        raise LodesetError(f"the model as stored in {folder} does not run: {type(error).__name__}: {error}") from error
    if not difference <= TOLERANCE:
        raise LodesetError(
            f"the model as stored in {folder} returns something else (difference: {difference:.2g} of its largest "
            "output): hooks, buffers that "
            "are not saved, and branches that depend on the input cannot be stored"
        )


def load_portable(folder: Path) -> fx.GraphModule:
    """The model that `save_portable` wrote, in evaluation mode on the CPU.

    Raises:
        LodesetError: a file is missing, is damaged or contains something unknown.
    """
    try:
        tree = json.loads((folder / GRAPH).read_text())
        weights = load_file(folder / WEIGHTS)
        root = nn.Module()
        called = {entry["target"] for entry in tree["nodes"] if entry["op"] == "call_module"}
        if called != tree["layers"].keys():
            raise ValueError("its layers are not the ones that the graph calls")
        # The meta device allocates no memory: the loaded weights bring their own.
        with torch.device("meta"):
            for name, entry in tree["layers"].items():
                _place(root, name, _built(entry))
        for entry in tree["nodes"]:
            if entry["op"] == "get_attr":
                weight = weights[entry["target"]]
                _place(root, entry["target"], nn.Parameter(weight, requires_grad=weight.is_floating_point()))
        model = fx.GraphModule(root, _graph(tree["nodes"]))
        model.load_state_dict(weights, assign=True)
    except Exception as error:  # a file may contain anything
        raise LodesetError(f"{folder} does not hold a model: {type(error).__name__}: {error}") from error
    return model.eval()


# -- writing


def _layer_entry(name: str, layer: nn.Module) -> dict[str, Any]:
    """The class of a layer and its constructor arguments."""
    if LAYERS.get(type(layer).__name__) is not type(layer):
        raise LodesetError(
            f"{name} is a {type(layer).__name__}, and only these layers can be stored: {', '.join(LAYERS)}"
        )
    entry: dict[str, Any] = {"layer": type(layer).__name__}
    for argument in inspect.signature(type(layer)).parameters:
        if argument == "bias":
            entry[argument] = layer.bias is not None
        elif hasattr(layer, argument) and argument not in PLACES:
            entry[argument] = _plain(getattr(layer, argument), name)
    return entry


def _node_entry(node: fx.Node) -> dict[str, Any]:
    entry: dict[str, Any] = {"op": node.op, "name": node.name}
    if node.op == "call_function" and node.target is getattr and node.args[1] == "shape":
        entry |= {"op": "call_method", "target": "size"}
        return entry | {"args": _plain((node.args[0],), node.name), "kwargs": {}}
    if node.op == "call_function":
        if node.target not in _NAMES:
            raise LodesetError(
                f"{node.name} calls {node.target!r}, which cannot be stored: use one of {', '.join(FUNCTIONS)}"
            )
        entry["target"] = _NAMES[node.target]
    elif node.op == "call_method" and node.target not in METHODS:
        raise LodesetError(
            f"{node.name} calls the method {node.target}, which cannot be stored: use one of {sorted(METHODS)}"
        )
    elif node.op != "output":
        entry["target"] = str(node.target)
    return entry | {
        "args": _plain(tuple(node.args), node.name),
        "kwargs": {k: _plain(v, node.name) for k, v in node.kwargs.items()},
    }


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [_plain(v, where) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, tuple):
        return {"tuple": [_plain(v, where) for v in value]}
    if isinstance(value, list):
        return [_plain(v, where) for v in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(v, where) for key, v in value.items()}}
    raise LodesetError(f"{where} takes a {type(value).__name__}, which cannot be stored")


# -- reading


def _built(entry: dict[str, Any]) -> nn.Module:
    if PLACES & entry.keys():
        raise ValueError(f"{', '.join(PLACES & entry.keys())} is not an argument that a file may set")
    arguments = {name: _value(value, {}) for name, value in entry.items() if name != "layer"}
    return LAYERS[entry["layer"]](**arguments)


def _place(root: nn.Module, path: str, child: nn.Module | nn.Parameter) -> None:
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not the name of a layer")
    *parents, own = path.split(".")
    for name in parents:
        if not isinstance(getattr(root, name, None), nn.Module):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if isinstance(child, nn.Parameter):
        root.register_parameter(own, child)
    else:
        root.add_module(own, child)


def _graph(nodes: list[dict[str, Any]]) -> fx.Graph:
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for entry in nodes:
        op, name, target = entry["op"], entry["name"], entry.get("target", "output")
        if not _IDENTIFIER.fullmatch(name) or (op == "placeholder" and not _IDENTIFIER.fullmatch(target)):
            raise ValueError(f"{name!r} is not a name")
        if op == "call_function":
            target = FUNCTIONS[target]
        elif op == "call_method" and target not in METHODS:
            raise ValueError(f"method {target!r} is not known")
        elif op in ("call_module", "get_attr") and not _PATH.fullmatch(target):
            raise ValueError(f"{target!r} is not the name of a layer")
        elif op not in ("placeholder", "call_method", "call_module", "get_attr", "output"):
            raise ValueError(f"op {op!r} is not known")
        args, kwargs = _value(entry["args"], made), {key: _value(value, made) for key, value in entry["kwargs"].items()}
        if not all(_IDENTIFIER.fullmatch(key) for key in kwargs):
            raise ValueError(f"{name}: the name of an argument is not an identifier")
        made[name] = graph.create_node(op, target, args, kwargs, name=name)
    graph.lint()
    return graph


def _value(stored: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(stored, list):
        return [_value(item, made) for item in stored]
    if not isinstance(stored, dict):
        return stored
    ((kind, value),) = stored.items()
    if kind == "node":
        return made[value]
    if kind == "slice":
        return slice(*(_value(item, made) for item in value))
    if kind == "ellipsis":
        return ...
    if kind == "tuple":
        return tuple(_value(item, made) for item in value)
    if kind == "dict":
        return {key: _value(item, made) for key, item in value.items()}
    raise ValueError(f"{kind!r} is not a kind of value")
