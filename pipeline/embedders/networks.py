"""Networks as embedders, including TorchScript files. B images, D dimensions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lodeset.pipeline.embedders import Embed
from lodeset.pipeline.embedders.config import Dtype, TorchScriptEmbedder
from lodeset.pipeline.embedders.preprocess import Map, Recipe, inputs
from lodeset.pipeline.errors import LodesetError

if TYPE_CHECKING:
    import torch


def recipe_of(config: TorchScriptEmbedder) -> Recipe:
    """The preprocessing of a configuration."""
    return Recipe(config.resize, config.size, config.size, config.mean, config.std, config.interpolation)


def torchscript(config: TorchScriptEmbedder, threads: int) -> Embed:
    """A TorchScript network on one worker's `threads` cores, or its GPU.

    Raises:
        LodesetError: as `onnx`.
    """
    import torch

    torch.set_num_threads(threads)
    present(config.path, "embed")
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
            raise LodesetError(f"{config.path} returns a {type(out).__name__}; an embedder returns one tensor [B, D]")
        return cast(NDArray[np.float32], out.float().cpu().numpy())

    return embedder(forward, recipe_of(config), config.path, threads)


def arithmetic(dtype: Dtype, device: str) -> contextlib.AbstractContextManager[object]:
    """Compute the block in `dtype`, in mixed precision for 16 bits; `auto` is fp16 on a GPU, otherwise fp32.

    fp16 rather than bf16: vectors are stored in fp16, and bf16 has three bits less.
    """
    import torch

    chosen: torch.dtype | None = {"auto": torch.float16 if device == "cuda" else None, "fp32": None}.get(dtype)
    if dtype in ("bf16", "fp16"):
        chosen = torch.bfloat16 if dtype == "bf16" else torch.float16
    return torch.autocast(device, dtype=chosen) if chosen is not None else contextlib.nullcontext()


def embedder(
    forward: Callable[[NDArray[np.float32]], NDArray[np.float32]], recipe: Recipe, name: str, threads: int
) -> Embed:
    """A network from float32 [B, 3, height, width] to float32 [B, D] with its preprocessing; `name` is used in
    messages.
    """
    mapped = cast(Map, ThreadPoolExecutor(threads).map) if threads > 1 else map

    def embed(images: Sequence[Image.Image]) -> NDArray[np.float32]:
        blocks = [(rows, _matrix(forward(batch), len(rows), name)) for rows, batch in inputs(images, recipe, mapped)]
        widths = sorted({block.shape[1] for _, block in blocks})
        if len(widths) > 1:
            raise LodesetError(
                f"{name} returns vectors of widths {widths}, depending on the shape of the image: pool them first"
            )
        vectors = np.empty((len(images), *widths), np.float32)
        for rows, block in blocks:
            vectors[rows] = block
        return vectors

    return embed


def present(path: str, key: str) -> None:
    """Raise a LodesetError that names `key`, the file's place in the configuration, if the file does not exist."""
    if not Path(path).is_file():
        kind = "embedder" if key == "embed" else "model"
        raise LodesetError(
            f"no {kind} at {path}: check `{key}: path:` (relative paths start from the configuration file)"
        )


def _matrix(out: NDArray[np.float32], images: int, name: str) -> NDArray[np.float32]:
    if out.ndim != 2 or len(out) != images:
        raise LodesetError(
            f"{name} returns an output of shape {list(out.shape)} for {images} images; an embedder returns [B, D], "
            "one row per image: pool it first"
        )
    return out.astype(np.float32, copy=False)
