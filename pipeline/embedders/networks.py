"""ONNX and TorchScript files as embedders. B images, D dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import OnnxEmbedder, TorchScriptEmbedder
from pipeline.embedders import Embed
from pipeline.errors import LodesetError

if TYPE_CHECKING:
    import onnxruntime


def pixels(images: Sequence[Image.Image], config: OnnxEmbedder | TorchScriptEmbedder) -> NDArray[np.float32]:
    """RGB images -> float32 [B, 3, size, size], resized to the square (bicubic) and normalised."""
    side = config.size
    # reducing_gap: whole reductions by a box filter come first, so that large photographs cost less.
    small = [i.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0) for i in images]
    scale = (1.0 / (255.0 * np.array(config.std))).astype(np.float32)
    shift = (np.array(config.mean) / np.array(config.std)).astype(np.float32)
    batch = np.stack([np.asarray(i) for i in small]).astype(np.float32) * scale - shift  # [B, size, size, 3]
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))


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

    def embed(images: Sequence[Image.Image]) -> NDArray[np.float32]:
        try:
            (out, *_) = network.run(None, {source.name: pixels(images, config)})
        except Exception as error:
            shape = [len(images), 3, config.size, config.size]
            raise LodesetError(
                f"{config.path} takes {source.shape}, given {shape} (embed.size = {config.size}): {error}"
            ) from error
        return _matrix(np.asarray(out), config.path)

    return embed


def torchscript(config: TorchScriptEmbedder, threads: int) -> Embed:
    """A TorchScript network on one worker's `threads` cores.

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

    def embed(images: Sequence[Image.Image]) -> NDArray[np.float32]:
        with torch.inference_mode():
            try:
                out = module(torch.from_numpy(pixels(images, config)).to(device))
            except RuntimeError as error:
                shape = [len(images), 3, config.size, config.size]
                raise LodesetError(
                    f"{config.path} does not take {shape} (embed.size = {config.size}): {str(error)[-300:]}"
                ) from error
        return _matrix(out.float().cpu().numpy(), config.path)

    return embed


def _present(path: str, key: str) -> None:
    if not Path(path).is_file():
        what = "embedder" if key == "embed" else "model"
        raise LodesetError(
            f"no {what} at {path}: check `{key}: path:` (relative paths start from the configuration file)"
        )


def _matrix(out: NDArray[np.float32], path: str) -> NDArray[np.float32]:
    if out.ndim != 2:
        raise LodesetError(
            f"{path} gives an output of shape {list(out.shape)}; an embedder gives [B, D]: pool it first"
        )
    return out.astype(np.float32, copy=False)
