"""Export a model as an ONNX network, with the preprocessing in its metadata.

Shapes: B images, r x c patches, S the side of the grid that positions are stored for, D width.
"""

import copy
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lodeset.pipeline.embedders.onnx import MEAN_KEY, SIZE_KEY, STD_KEY
from lodeset.pipeline.embedders.preprocess import IMAGENET_MEAN, IMAGENET_STD
from lodeset.pipeline.errors import LodesetError
from lodeset.training.backbone import Backbone
from lodeset.training.vit import DinoVisionTransformer

LIMIT = 2**31 - 2**20  # bytes; a protobuf message is limited to 2 GiB
STEP = 32  # pixels: networks other than lodeset's transformers accept multiples of it, if they accept several sizes
CLOSE = 1e-3  # allowed difference between the network and its ONNX form, relative to the largest number of an output


def export_onnx(model: nn.Module, path: Path, size: int) -> bool:
    """Write an ONNX network with input `image` float32 [B, 3, height, width] and outputs `embedding` [B, D] (CLS) and
    `patches` [B, r c, D]; for networks that are not lodeset's, the outputs are what they return.

    B is free, and so are the sides if the network takes images of several sizes; otherwise they are `size`. Returns
    whether the sides are free. The metadata contain `image_size`, `image_mean` and `image_std`, so that the file works
    as an embedder of kind `onnx`.

    Raises:
        LodesetError: the `onnx` extra is not installed, or `size` is not a multiple of the patch size.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise LodesetError("exporting to ONNX needs onnxscript: pip install 'lodeset[onnx]'")
    whole, names, step = copy.deepcopy(model).cpu().float().eval(), None, STEP
    if isinstance(whole, DinoVisionTransformer):
        step = whole.config.patch_size
        if size < step or size % step:
            raise LodesetError(
                f"size {size} is not a multiple of patch size {step}: use {max(step, size // step * step)}"
            )
        whole, names = _AnySize(whole), ["embedding", "patches"]
    elif isinstance(whole, Backbone):
        step = whole.config.patch_size
        whole, names = _Returned(whole), ["embedding", "patches"]
    size_bytes = sum(parameter.numel() for parameter in model.parameters()) * 4
    if size_bytes >= LIMIT:
        raise LodesetError(
            f"the model takes {size_bytes / 1e9:.1f} GB, but one ONNX file holds at most {LIMIT / 1e9:.1f} GB: use "
            "the export in safetensors, or distill a smaller model"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    free = _written(whole, temporary, names, size, step) and _agrees(whole, temporary, size, step)
    if not free:
        _write(whole, temporary, names, (torch.zeros(2, 3, size, size),), {0: torch.export.Dim("batch")}, size)
    os.replace(temporary, path)
    return free


def _written(model: nn.Module, path: Path, names: list[str] | None, size: int, step: int) -> bool:
    """Write the network; return whether it could be written for images of any size."""
    sides: dict[int, Any] = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    if isinstance(model, _AnySize):
        sides = {2: step * torch.export.Dim("rows"), 3: step * torch.export.Dim("columns")}
    try:
        # Sides that differ from each other and from the stored grid, so that nothing specific to one of them is taken
        # for a rule.
        example = torch.zeros(2, 3, size + step, size + 2 * step)
        with torch.no_grad():
            model(example)
        _write(model, path, names, (example,), {0: torch.export.Dim("batch"), **sides}, size)
    except Exception:  # the exporter raises arbitrary errors for networks that were made for a single size
        return False
    return True


def _write(
    model: nn.Module, path: Path, names: list[str] | None, example: tuple[Tensor], free: dict[int, Any], size: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own code
        program = torch.onnx.export(
            model,
            example,
            input_names=["image"],
            output_names=names,
            dynamic_shapes=(free,),
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    metadata = {SIZE_KEY: size, MEAN_KEY: IMAGENET_MEAN, STD_KEY: IMAGENET_STD}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    program.save(str(path), external_data=False)


def _agrees(model: nn.Module, path: Path, size: int, step: int) -> bool:
    """Whether the file returns what the network returns, at the size that it was written for and at others."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for batch, height, width in ((1, size, size), (2, size + 3 * step, size + step), (1, size, size + step)):
            image = torch.linspace(-2, 2, batch * 3 * height * width).sin().view(batch, 3, height, width)
            with torch.no_grad():
                expected = model(image)
            outputs = session.run(None, {"image": image.numpy()})
            for of_model, of_file in zip(_tensors(expected), outputs, strict=True):
                if of_file.shape != of_model.shape or np.abs(of_file - of_model).max() > CLOSE * max(
                    1e-6, np.abs(of_model).max()
                ):
                    return False
    except Exception:  # onnxruntime has no public base class of its errors
        return False
    return True


def _tensors(output: object) -> list[np.ndarray[Any, Any]]:
    if isinstance(output, Tensor):
        return [output.numpy()]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [array for part in parts for array in _tensors(part)]


class _Returned(nn.Module):
    """Another backbone, which returns what an ONNX network can."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model(image)
        return features.cls, features.patches


class _AnySize(nn.Module):
    """lodeset's transformer as a graph that is valid for images of every size: matrix products interpolate the
    positions, and change nothing on the grid that the positions are stored for.
    """

    def __init__(self, model: DinoVisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        grid = model.patch_embed.proj(image)  # [B, D, r, c]
        rows, columns = grid.shape[-2:]
        batch, dim = grid.shape[0], model.config.dim
        x = torch.cat([model.cls_token.expand(batch, -1, -1), grid.flatten(2).transpose(1, 2)], dim=1)
        side = model.image_size // model.config.patch_size
        stored = model.pos_embed[:, 1:].view(side, side, dim)
        down, across = _interpolations(rows, columns, side, antialias=model.register_tokens is not None)
        patches = torch.einsum("rs,std,ct->rcd", down, stored, across).reshape(1, -1, dim)
        x = x + torch.cat([model.pos_embed[:, :1], patches], dim=1)
        if model.register_tokens is not None:
            x = torch.cat([x[:, :1], model.register_tokens.expand(batch, -1, -1), x[:, 1:]], dim=1)
        tokens = x.shape[1]
        x = x.flatten(0, 1)
        for block in model.blocks:
            x = block(x, [(batch, tokens)])
        x = model.norm(x).view(batch, tokens, dim)
        return x[:, 0], x[:, 1 + model.config.registers :]


def _interpolations(rows: int, columns: int, side: int, antialias: bool) -> tuple[Tensor, Tensor]:
    """The interpolation of `DinoVisionTransformer.interpolated` along each side as matrices, [r, S] and [c, S]."""
    counts = [
        torch.ones(n).sum() for n in (rows, columns)
    ]  # tensors, because the sizes are not known when the graph is made
    if antialias:
        down, across = (_smooth(n, count, side) for n, count in zip((rows, columns), counts, strict=True))
        return down, across
    as_stored = (counts[0] == side) & (counts[1] == side)
    offset = torch.where(as_stored, 0.0, 0.1)
    down, across = (_sharp(n, (count + offset) / side, side) for n, count in zip((rows, columns), counts, strict=True))
    return down, across


def _sharp(length: int, scale: Tensor, side: int) -> Tensor:
    """Bicubic without antialias, by a scale factor: four taps, clamped at the border. [length, S]."""
    source = (torch.arange(length) + 0.5) / scale - 0.5
    first = source.floor()
    matrix = torch.zeros(1)
    for tap in range(-1, 3):
        place = (first + tap).clamp(0, side - 1)
        weight = _cubic((source - first - tap).abs(), -0.75)
        matrix = matrix + weight[:, None] * (place[:, None] == torch.arange(side)).float()
    return matrix


def _smooth(length: int, count: Tensor, side: int) -> Tensor:
    """Bicubic with antialias, by size: the filter is as wide as the input range of one output value. [length, S]."""
    scale = side / count
    centre = scale * (torch.arange(length) + 0.5)
    distance = (torch.arange(side) + 0.5 - centre[:, None]) / scale.clamp(min=1.0)
    weight = _cubic(distance.abs(), -0.5)
    return weight / weight.sum(dim=1, keepdim=True)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' kernel for distances x >= 0."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
