"""Small ONNX files, written as the protocol buffers that they are: no package that writes them is needed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, shape: Sequence[int | str]) -> bytes:
    """ValueInfoProto of float32; a dimension is a number or a name."""
    dims = b"".join(_field(1, _field(1 if isinstance(d, int) else 2, d)) for d in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))


def _node(kind: str, source: str, target: str, **attributes: int | Sequence[int]) -> bytes:
    node = _field(1, source) + _field(2, target) + _field(4, kind)
    for name, value in attributes.items():
        numbers = _field(3, value) + _field(20, 2) if isinstance(value, int) else b"".join(_field(8, v) for v in value)
        node += _field(5, _field(1, name) + numbers + (b"" if isinstance(value, int) else _field(20, 7)))
    return node


def write_means(path: Path, size: int, batch: int | str = "B", then: Sequence[str] = (), outputs: int = 1) -> Path:
    """A network of images [batch, 3, size, size] to their channel means [batch, 3], through the operators `then`.

    With `outputs` 2 it has the outputs `scores` and `negated`; with `then=["ReduceMean"]` one number an image.
    """
    nodes = [_node("ReduceMean", "image", "means", axes=[2, 3], keepdims=0)]
    last = "means"
    for n, kind in enumerate(then):
        options = {"axes": [1], "keepdims": 0} if kind == "ReduceMean" else {}
        nodes.append(_node(kind, last, f"step{n}", **options))
        last = f"step{n}"
    nodes.append(_node("Identity", last, "scores"))
    found = ["scores"]
    if outputs == 2:
        nodes.append(_node("Neg", last, "negated"))
        found.append("negated")
    shape = (batch,) if "ReduceMean" in then else (batch, 3)
    graph = (
        b"".join(_field(1, node) for node in nodes)
        + _field(2, "means")
        + _field(11, _tensor("image", (batch, 3, size, size)))
        + b"".join(_field(12, _tensor(name, shape)) for name in found)
    )
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return path


def write_detector(path: Path, size: int, boxes: Sequence[Sequence[float]], weights: Sequence[float]) -> Path:
    """A network of one image [1, 3, size, size] to `boxes` [N, 4], whatever it shows, and scores [N]: `weights` times the
    mean of its pixels."""

    def constant(name: str, shape: Sequence[int], values: Sequence[float]) -> bytes:
        raw = struct.pack(f"<{len(values)}f", *values)
        return b"".join(_field(1, d) for d in shape) + _field(2, 1) + _field(8, name) + _field(9, raw)

    count = len(boxes)
    scaled = _field(1, "mean") + _field(1, "weights") + _field(2, "scores") + _field(4, "Mul")
    nodes = [
        _node("ReduceMean", "image", "mean", axes=[1, 2, 3], keepdims=0),
        scaled,
        _node("Identity", "fixed", "boxes"),
    ]
    graph = (
        b"".join(_field(1, node) for node in nodes)
        + _field(2, "faces")
        + _field(5, constant("fixed", (count, 4), [value for box in boxes for value in box]))
        + _field(5, constant("weights", (count,), weights))
        + _field(11, _tensor("image", (1, 3, size, size)))
        + _field(12, _tensor("boxes", (count, 4)))
        + _field(12, _tensor("scores", (count,)))
    )
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return path
