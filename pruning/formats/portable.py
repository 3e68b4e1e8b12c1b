"""Models of any origin on disk, to be loaded without the code that defined them: safetensors, and the graph of their layers as JSON.

A model is traced (torch.fx) into calls of layers of `torch.nn`, of functions and of methods of tensors, each from a list of known ones. Nothing
of a file is executed: names are checked, and what is not on the lists is refused, on writing as on reading.
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
PLACES = {"device", "dtype"}  # arguments of layers that are not theirs to tell
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def save_portable(model: nn.Module, folder: Path, example: Tensor) -> None:
    """Write `model.safetensors` and `graph.json`; what they give for `example`, a batch of images, must be what the model gives.

    Raises:
        LodesetError: the model computes something that the files cannot tell.
    """
    training = model.training
    try:
        traced = fx.Tracer().trace(model.eval())
    except Exception as error:  # whatever a stranger's forward pass raises where it looks at values
        raise LodesetError(
            f"the model cannot be traced: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        model.train(training)
    layers = {
        str(node.target): model.get_submodule(str(node.target)) for node in traced.nodes if node.op == "call_module"
    }
    tree = {
        "layers": {name: _described(name, layer) for name, layer in layers.items()},
        "nodes": [_told(node) for node in traced.nodes],
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
    except Exception as error:  # of a model that is not what was traced
        raise LodesetError(f"the model as stored in {folder} does not run: {type(error).__name__}: {error}") from error
    if not difference <= TOLERANCE:
        raise LodesetError(
            f"the model as stored in {folder} gives something else ({difference:.2g} of its largest output): hooks, buffers that are not "
            "saved, and branches on what it is given cannot be stored"
        )


def load_portable(folder: Path) -> fx.GraphModule:
    """The model that `save_portable` wrote, in evaluation mode on the CPU.

    Raises:
        LodesetError: a file is missing or damaged, or holds what is not known.
    """
    try:
        tree = json.loads((folder / GRAPH).read_text())
        weights = load_file(folder / WEIGHTS)
        root = nn.Module()
        called = {told["target"] for told in tree["nodes"] if told["op"] == "call_module"}
        if called != tree["layers"].keys():
            raise ValueError("layers are not those that the graph calls")
        # Without memory: the weights, which are there, bring their own.
        with torch.device("meta"):
            for name, told in tree["layers"].items():
                _place(root, name, _built(told))
        for told in tree["nodes"]:
            if told["op"] == "get_attr":
                weight = weights[told["target"]]
                _place(root, told["target"], nn.Parameter(weight, requires_grad=weight.is_floating_point()))
        model = fx.GraphModule(root, _graph(tree["nodes"]))
        model.load_state_dict(weights, assign=True)
    except Exception as error:  # a file may hold anything
        raise LodesetError(f"{folder} does not hold a model: {type(error).__name__}: {error}") from error
    return model.eval()


# -- writing


def _described(name: str, layer: nn.Module) -> dict[str, Any]:
    """The class of a layer and what its constructor takes."""
    if LAYERS.get(type(layer).__name__) is not type(layer):
        raise LodesetError(
            f"{name} is a {type(layer).__name__}, and only these layers can be stored: {', '.join(LAYERS)}"
        )
    told: dict[str, Any] = {"layer": type(layer).__name__}
    for argument in inspect.signature(type(layer)).parameters:
        if argument == "bias":
            told[argument] = layer.bias is not None
        elif hasattr(layer, argument) and argument not in PLACES:
            told[argument] = _plain(getattr(layer, argument), name)
    return told


def _told(node: fx.Node) -> dict[str, Any]:
    told: dict[str, Any] = {"op": node.op, "name": node.name}
    if node.op == "call_function" and node.target is getattr and node.args[1] == "shape":
        told |= {"op": "call_method", "target": "size"}
        return told | {"args": _plain((node.args[0],), node.name), "kwargs": {}}
    if node.op == "call_function":
        if node.target not in _NAMES:
            raise LodesetError(
                f"{node.name} calls {node.target!r}, which cannot be stored: use one of {', '.join(FUNCTIONS)}"
            )
        told["target"] = _NAMES[node.target]
    elif node.op == "call_method" and node.target not in METHODS:
        raise LodesetError(
            f"{node.name} calls the method {node.target}, which cannot be stored: use one of {sorted(METHODS)}"
        )
    elif node.op != "output":
        told["target"] = str(node.target)
    return told | {
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


def _built(told: dict[str, Any]) -> nn.Module:
    if PLACES & told.keys():
        raise ValueError(f"{', '.join(PLACES & told.keys())} is not a layer's own")
    arguments = {name: _value(value, {}) for name, value in told.items() if name != "layer"}
    return LAYERS[told["layer"]](**arguments)


def _place(root: nn.Module, path: str, what: nn.Module | nn.Parameter) -> None:
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not the name of a layer")
    *parents, own = path.split(".")
    for name in parents:
        if not isinstance(getattr(root, name, None), nn.Module):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if isinstance(what, nn.Parameter):
        root.register_parameter(own, what)
    else:
        root.add_module(own, what)


def _graph(nodes: list[dict[str, Any]]) -> fx.Graph:
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for told in nodes:
        op, name, target = told["op"], told["name"], told.get("target", "output")
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
        args, kwargs = _value(told["args"], made), {key: _value(value, made) for key, value in told["kwargs"].items()}
        if not all(_IDENTIFIER.fullmatch(key) for key in kwargs):
            raise ValueError(f"{name}: an argument's name is none")
        made[name] = graph.create_node(op, target, args, kwargs, name=name)
    graph.lint()
    return graph


def _value(told: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(told, list):
        return [_value(one, made) for one in told]
    if not isinstance(told, dict):
        return told
    ((kind, value),) = told.items()
    if kind == "node":
        return made[value]
    if kind == "slice":
        return slice(*(_value(one, made) for one in value))
    if kind == "ellipsis":
        return ...
    if kind == "tuple":
        return tuple(_value(one, made) for one in value)
    if kind == "dict":
        return {key: _value(one, made) for key, one in value.items()}
    raise ValueError(f"{kind!r} is not a kind of value")
