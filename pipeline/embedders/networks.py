"""ONNX and TorchScript files as embedders. B images, D dimensions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.embedders import Embed
from pipeline.embedders.config import Dtype, OnnxEmbedder, TorchScriptEmbedder
from pipeline.embedders.preprocess import Map, Recipe, inputs
from pipeline.errors import LodesetError

if TYPE_CHECKING:
    import onnxruntime
    import torch


def recipe_of(config: OnnxEmbedder | TorchScriptEmbedder) -> Recipe:
    """The preprocessing that a configuration says."""
    if isinstance(config, OnnxEmbedder):
        return Recipe("square", config.size, config.size, config.mean, config.std)
    return Recipe(config.resize, config.size, config.size, config.mean, config.std, config.interpolation)


def session(path: str, threads: int, key: str) -> onnxruntime.InferenceSession:
    """An ONNX network on `threads` cores, or on a GPU that onnxruntime was built for; `key` is its place in the configuration.

    Raises:
        LodesetError: the file is missing, or broken.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    _present(path, key)
    available = onnxruntime.get_available_providers()
    providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:
        # onnxruntime has no public base class for "this file is not a model".
        raise LodesetError(f"{path} is not an ONNX model that can be loaded: {error}") from error


def onnx(config: OnnxEmbedder, threads: int) -> Embed:
    """An ONNX network on one worker's `threads` cores.

    Raises:
        LodesetError: the file is missing, broken, or not a network of images to vectors.
    """
    network = session(config.path, threads, "embed")
    source = network.get_inputs()[0]

    def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            (out, *_) = network.run(None, {source.name: batch})
        except Exception as error:
            raise LodesetError(
                f"{config.path} takes {source.shape}, given {list(batch.shape)} (embed.size = {config.size}): {error}"
            ) from error
        return np.asarray(out)

    return embedder(forward, recipe_of(config), config.path, threads)


def torchscript(config: TorchScriptEmbedder, threads: int) -> Embed:
    """A TorchScript network on one worker's `threads` cores, or its GPU.

    Raises:
        LodesetError: as `onnx`.
    """
    import torch

    torch.set_num_threads(threads)
    _present(config.path, "embed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        module = torch.jit.load(config.path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise LodesetError(f"{config.path} is not a TorchScript file that can be loaded: {str(error)[:300]}") from error

    def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode(), arithmetic(config.dtype, device):
            try:
                out = module(torch.from_numpy(batch).to(device))
            except RuntimeError as error:
                raise LodesetError(
                    f"{config.path} does not take {list(batch.shape)} (embed.size = {config.size}, "
                    f"dtype {config.dtype}): {str(error)[-300:]}"
                ) from error
        if not isinstance(out, torch.Tensor):
            raise LodesetError(f"{config.path} gives a {type(out).__name__}; an embedder gives one tensor [B, D]")
        return cast(NDArray[np.float32], out.float().cpu().numpy())

    return embedder(forward, recipe_of(config), config.path, threads)


def arithmetic(dtype: Dtype, device: str) -> contextlib.AbstractContextManager[object]:
    """The block computes in `dtype`, in mixed precision where it is one of 16 bits; `auto` is fp16 on a GPU, else fp32.

    fp16 rather than bf16: vectors are stored in fp16, and bf16 keeps three bits less of them.
    """
    import torch

    chosen: torch.dtype | None = {"auto": torch.float16 if device == "cuda" else None, "fp32": None}.get(dtype)
    if dtype in ("bf16", "fp16"):
        chosen = torch.bfloat16 if dtype == "bf16" else torch.float16
    return torch.autocast(device, dtype=chosen) if chosen is not None else contextlib.nullcontext()


def embedder(
    forward: Callable[[NDArray[np.float32]], NDArray[np.float32]], recipe: Recipe, name: str, threads: int
) -> Embed:
    """A network of float32 [B, 3, height, width] -> float32 [B, D] with its preprocessing; `name` is for messages."""
    mapped = cast(Map, ThreadPoolExecutor(threads).map) if threads > 1 else map

    def embed(images: Sequence[Image.Image]) -> NDArray[np.float32]:
        blocks = [(rows, _matrix(forward(batch), len(rows), name)) for rows, batch in inputs(images, recipe, mapped)]
        widths = sorted({block.shape[1] for _, block in blocks})
        if len(widths) > 1:
            raise LodesetError(f"{name} gives vectors of widths {widths}, by the shape of the image: pool them first")
        vectors = np.empty((len(images), *widths), np.float32)
        for rows, block in blocks:
            vectors[rows] = block
        return vectors

    return embed


def _present(path: str, key: str) -> None:
    if not Path(path).is_file():
        what = "embedder" if key == "embed" else "model"
        raise LodesetError(
            f"no {what} at {path}: check `{key}: path:` (relative paths start from the configuration file)"
        )


def _matrix(out: NDArray[np.float32], images: int, name: str) -> NDArray[np.float32]:
    if out.ndim != 2 or len(out) != images:
        raise LodesetError(
            f"{name} gives an output of shape {list(out.shape)} for {images} images; an embedder gives [B, D], one row "
            "an image: pool it first"
        )
    return out.astype(np.float32, copy=False)
