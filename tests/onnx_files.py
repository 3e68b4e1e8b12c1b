"""Small ONNX files, written as the protocol buffers that they are: no package that writes them is needed."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
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


FLOAT, UINT8, INT64, FLOAT16, DOUBLE = 1, 2, 7, 10, 11  # TensorProto's numbers of types


def _tensor(name: str, shape: Sequence[int | str], element: int = FLOAT) -> bytes:
    """ValueInfoProto; a dimension is a number or a name."""
    dims = b"".join(_field(1, _field(1 if isinstance(d, int) else 2, d)) for d in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, element) + _field(2, dims)))


def _node(kind: str, source: str, target: str, **attributes: int | Sequence[int]) -> bytes:
    node = _field(1, source) + _field(2, target) + _field(4, kind)
    for name, value in attributes.items():
        numbers = _field(3, value) + _field(20, 2) if isinstance(value, int) else b"".join(_field(8, v) for v in value)
        node += _field(5, _field(1, name) + numbers + (b"" if isinstance(value, int) else _field(20, 7)))
    return node


def write_means(
    path: Path,
    size: int | str,
    batch: int | str = "B",
    then: Sequence[str] = (),
    outputs: int = 1,
    *,
    element: int = FLOAT,
    shape: Sequence[int | str] | None = None,
    channels_last: bool = False,
    for_one: bool = False,
    keepdims: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A network of images [batch, 3, size, size] to their channel means [batch, 3], through the operators `then`.

    With `outputs` 2 it has the outputs `scores` and `negated`; with `then=["ReduceMean"]` one number an image. `element` is the type
    of its input and output (bytes give floats); `for_one` works for one image alone, whatever the shape says; `keepdims` gives
    [batch, 3, 1, 1]; `shape` is said of the input in place of its own.
    """
    axes = [1, 2] if channels_last else [2, 3]
    nodes = [_node("ReduceMean", "image", "means", axes=axes, keepdims=int(keepdims))]
    last, constants = "means", b""
    if element == UINT8:
        nodes = [
            _node("Cast", "image", "floats", to=FLOAT),
            _node("ReduceMean", "floats", "means", axes=axes, keepdims=0),
        ]
    if for_one:
        constants = _field(5, _field(1, 2) + _field(2, INT64) + _field(8, "one") + _field(9, struct.pack("<2q", 1, 3)))
        nodes.append(_field(1, last) + _field(1, "one") + _field(2, "reshaped") + _field(4, "Reshape"))
        last = "reshaped"
    for n, kind in enumerate(then):
        options = {"axes": [1], "keepdims": 0} if kind == "ReduceMean" else {}
        nodes.append(_node(kind, last, f"step{n}", **options))
        last = f"step{n}"
    nodes.append(_node("Identity", last, "scores"))
    found = ["scores"]
    if outputs == 2:
        nodes.append(_node("Neg", last, "negated"))
        found.append("negated")
    given = shape or ((batch, size, size, 3) if channels_last else (batch, 3, size, size))
    vectors = (batch,) if "ReduceMean" in then else (batch, 3, 1, 1) if keepdims else (batch, 3)
    graph = (
        b"".join(_field(1, node) for node in nodes)
        + _field(2, "means")
        + constants
        + _field(11, _tensor("image", given, element))
        + b"".join(_field(12, _tensor(name, vectors, FLOAT if element == UINT8 else element)) for name in found)
    )
    said = b"".join(_field(14, _field(1, key) + _field(2, text)) for key, text in (metadata or {}).items())
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)) + said)
    return path


def write_detector(
    path: Path,
    size: int,
    boxes: Sequence[Sequence[float]],
    weights: Sequence[float],
    *,
    batch: int = 1,
    element: int = FLOAT,
    channels_last: bool = False,
) -> Path:
    """A network of images [batch, 3, size, size] to boxes, whatever they show, and scores: `weights` times the mean of an image's pixels.

    Of one image they are [N, 4] and [N], of several [batch, N, 4] and [batch, N].
    """

    def constant(name: str, shape: Sequence[int], values: Sequence[float]) -> bytes:
        raw = struct.pack(f"<{len(values)}f", *values)
        return b"".join(_field(1, d) for d in shape) + _field(2, 1) + _field(8, name) + _field(9, raw)

    one, count = () if batch == 1 else (batch,), len(boxes)
    keep = int(batch > 1)
    nodes = [
        _node("Cast", "image", "floats", to=FLOAT),
        _node("ReduceMean", "floats", "grey", axes=[1, 2, 3], keepdims=keep),
        _node("Flatten", "grey", "mean", axis=1) if batch > 1 else _node("Identity", "grey", "mean"),
        _field(1, "mean") + _field(1, "weights") + _field(2, "scores") + _field(4, "Mul"),
        _node("Identity", "fixed", "boxes"),
    ]
    graph = (
        b"".join(_field(1, node) for node in nodes)
        + _field(2, "faces")
        + _field(5, constant("fixed", (*one, count, 4), [value for box in boxes for value in box] * batch))
        + _field(5, constant("weights", (count,), weights))
        + _field(11, _tensor("image", (batch, size, size, 3) if channels_last else (batch, 3, size, size), element))
        + _field(12, _tensor("boxes", (*one, count, 4)))
        + _field(12, _tensor("scores", (*one, count)))
    )
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return path
