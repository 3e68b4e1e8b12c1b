"""A vision model of Hugging Face transformers as an embedder: weights from safetensors, no remote code.

Shapes: B images, N tokens, D dimensions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.embedders import Embed
from lodeset.pipeline.embedders.config import HuggingFaceEmbedder
from lodeset.pipeline.embedders.hub import CONFIG, INSTALL, PREPROCESSOR, located, read_json
from lodeset.pipeline.embedders.networks import arithmetic, embedder
from lodeset.pipeline.embedders.preprocess import IMAGENET_MEAN, IMAGENET_STD, Recipe, Triple
from lodeset.pipeline.errors import LodesetError

_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_MOST_OTHERS = 32  # maximum number of tokens that are not patches; published models have at most 9
_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


def huggingface(config: HuggingFaceEmbedder, threads: int) -> Embed:
    """The model on one worker's `threads` cores, or its GPU.

    Raises:
        LodesetError: transformers or the model is missing, its weights do not match it, it is not a model of images, it
            draws random numbers, or it cannot be pooled or fed as configured.
    """
    import torch

    torch.set_num_threads(threads)
    folder = located(config)
    model = _load(folder, config)
    recipe = recipe_of(folder, config)
    patch = getattr(model.config, "patch_size", 1)
    if isinstance(patch, int) and recipe.side % patch:
        near = max(patch, recipe.side // patch * patch)
        raise LodesetError(
            f"{config.model}: input size {recipe.side} is not a multiple of its patch size {patch}: set embed.size, "
            f"e.g. {near}"
        )
    accepts = inspect.signature(model.forward).parameters
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepts else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode(), arithmetic(config.dtype, device):
            try:
                out = model(pixel_values=torch.from_numpy(batch).to(device), **options)
            except (RuntimeError, ValueError, TypeError) as error:
                raise LodesetError(
                    f"{config.model} does not take {list(batch.shape)} (dtype {config.dtype}): {str(error)[-300:]}"
                ) from error
            pooled = _pooled(out, model, config, recipe.side)
        return cast(NDArray[np.float32], pooled.float().cpu().numpy())

    _repeatable(forward, recipe.side, config)
    return embedder(forward, recipe, config.model, threads)


def _repeatable(
    forward: Callable[[NDArray[np.float32]], NDArray[np.float32]], side: int, config: HuggingFaceEmbedder
) -> None:
    """Refuse networks that draw random numbers even in evaluation mode, as masked autoencoders do for the patches that
    they see.
    """
    ramp = np.linspace(-2, 2, 3 * side * side, dtype=np.float32).reshape(1, 3, side, side)
    first, second = forward(ramp), forward(ramp)
    if not np.allclose(first, second, atol=1e-2 * float(np.abs(first).max()), equal_nan=True):
        raise LodesetError(
            f"{config.model} returns another vector each time it sees the same image, because it draws random numbers "
            "(a masked autoencoder does, unless mask_ratio is 0 in its config.json)"
        )


def _load(folder: Path, config: HuggingFaceEmbedder) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise LodesetError(f"{config.model}: {INSTALL} ({error})") from None
    import torch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:
        # A model's own code may raise anything for a damaged or unknown configuration.
        reason = " ".join(str(error).split())[:300]
        raise LodesetError(
            f"{folder} is not a model that transformers can load without running its code: {reason}"
        ) from error
    # transformers initializes missing weights at random without an error. Weights that pooling does not use may be
    # missing.
    unread = ("mask_token",) if config.pooling == "pooler" else ("mask_token", "pooler.")
    missing = sorted(name for name in report["missing_keys"] if not any(part in name for part in unread))
    if missing:
        raise LodesetError(
            f"{folder}: the checkpoint lacks {len(missing)} of the weights of {type(model).__name__} "
            f"({', '.join(missing[:3])}): it was saved from another kind of model"
            + (", or has no pooler: use `pooling: cls`" if all("pooler." in name for name in missing) else "")
        )
    if model.main_input_name != "pixel_values":
        raise LodesetError(
            f"{config.model} is a {type(model).__name__}, which takes {model.main_input_name}, not only images: "
            "save its vision part (model.vision_model.save_pretrained(FOLDER)) and give that folder"
        )
    return model.eval()


def _pooled(out: Any, model: Any, config: HuggingFaceEmbedder, side: int) -> Any:
    """The model's output -> [B, D]."""
    if config.pooling == "pooler":
        if getattr(out, "pooler_output", None) is None:
            raise LodesetError(f"{config.model} has no pooler_output: use `pooling: cls` or `mean`")
        return out.pooler_output.flatten(1)
    tokens = out.last_hidden_state  # [B, N, D], or [B, D, height, width] of a convolutional network
    if tokens.ndim == 4:
        if config.pooling == "cls":
            raise LodesetError(f"{config.model} has no class token: use `pooling: mean` or `pooler`")
        return tokens.mean(dim=(2, 3))
    if tokens.ndim != 3:
        raise LodesetError(
            f"{config.model} returns a last_hidden_state of shape {list(tokens.shape)}, but pooling takes tokens [B, "
            "N, D] or a map [B, D, height, width]: use `pooling: pooler`"
        )
    others = extra_tokens(tokens.shape[1], side, model.config)
    registers = getattr(model.config, "num_register_tokens", None) or 0
    if config.pooling == "cls":
        if others in (0, registers):
            raise LodesetError(
                f"{config.model} has no class token ({tokens.shape[1]} tokens for an image of {side} x {side} "
                "pixels): use `pooling: mean` or `pooler`"
            )
        return tokens[:, 0]
    return tokens[:, others:].mean(dim=1)


def extra_tokens(tokens: int, side: int, model: Any) -> int:
    """How many tokens of a square image are not patches: class token, registers and others, which come first.

    Derived from the number of tokens alone, because parameters can have any name. `model` is its configuration, which
    may contain the patch size; if it does not, the patches are assumed to form a square with as few other tokens as
    possible. A network that merges patches has only patches.
    """
    patch = getattr(model, "patch_size", None)
    if isinstance(patch, list | tuple) and len(patch) == 2 and patch[0] == patch[1]:
        patch = patch[0]
    if isinstance(patch, int) and patch > 0:
        others = tokens - (side // patch) ** 2
        if 0 <= others <= _MOST_OTHERS:
            return others
        if others < 0 and math.isqrt(tokens) ** 2 == tokens:
            return 0  # patches were merged
    return next((n for n in range(min(tokens, _MOST_OTHERS + 1)) if math.isqrt(tokens - n) ** 2 == tokens - n), 0)


def recipe_of(folder: Path, config: HuggingFaceEmbedder) -> Recipe:
    """The preprocessing in `preprocessor_config.json`; without one (as in our exports) the center square at the model's
    image_size, normalized by ImageNet's statistics.

    `embed.size` replaces the size of the input; a resize before a crop is scaled accordingly.

    Raises:
        LodesetError: it describes anything other than a resize to a square, or of the short side followed by a center
            crop.
    """
    if not (folder / PREPROCESSOR).is_file():
        side = config.size or read_json(folder / CONFIG).get("image_size")
        if not isinstance(side, int):
            raise LodesetError(f"{folder / CONFIG} has no square image_size ({side}): set embed.size")
        return Recipe("crop", side, side, IMAGENET_MEAN, IMAGENET_STD)
    path = folder / PREPROCESSOR
    settings = read_json(path)
    odd = sorted(
        key for key, value in settings.items() if key.startswith("do_") and value is True and key not in _STEPS
    )
    odd += [key for key in ("crop_pct", "size_divisor") if settings.get(key) is not None]
    odd += [key for key in ("do_resize", "do_rescale") if settings.get(key, True) is not True]
    if abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        odd.append("rescale_factor")
    if odd:
        raise LodesetError(
            f"{path}: {', '.join(f'{key} = {settings[key]}' for key in odd)} is not supported; {_SUPPORTED}"
        )
    if settings.get("resample") not in _FILTERS:
        raise LodesetError(f"{path}: resample = {settings.get('resample')}; 2 (bilinear) and 3 (bicubic) are supported")
    crop = bool(settings.get("do_center_crop", "crop_size" in settings))
    scaled = _side(settings, "size", "shortest_edge" if crop else "height", path)
    side = _side(settings, "crop_size", "height", path) if crop else scaled
    if side > scaled:
        raise LodesetError(
            f"{path}: the crop of {side} pixels is larger than the image, resized to {scaled}; {_SUPPORTED}"
        )
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if not settings.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif "image_mean" in settings and "image_std" in settings:
        mean, std = _triple(settings, "image_mean", path), _triple(settings, "image_std", path)
    else:
        raise LodesetError(f"{path} lacks image_mean or image_std, which differ from model to model: add them")
    if config.size:
        side, scaled = config.size, round(scaled * config.size / side)
    return Recipe("crop" if crop else "square", side, scaled, mean, std, cast(Any, _FILTERS[settings["resample"]]))


_SUPPORTED = "supported: a resize to a square, or of the shortest edge followed by a square center crop"


def _side(settings: Mapping[str, Any], key: str, wanted: str, path: Path) -> int:
    """The number of pixels of a size: a number, {shortest_edge: n}, or {height: n, width: n}."""
    size = settings.get(key)
    if isinstance(size, int):
        return size
    if isinstance(size, dict):
        known = {name: value for name, value in size.items() if value is not None}
        if known == {"shortest_edge": known.get(wanted)} or known == {
            "height": known.get(wanted),
            "width": known.get(wanted),
        }:
            return int(known[wanted])
    raise LodesetError(f"{path}: {key} = {size} is not supported; {_SUPPORTED}")


def _triple(settings: Mapping[str, Any], key: str, path: Path) -> Triple:
    values = settings[key]
    if not isinstance(values, list) or len(values) != 3:
        raise LodesetError(f"{path}: {key} = {values}; expected three numbers, one per channel")
    red, green, blue = map(float, values)
    return red, green, blue
