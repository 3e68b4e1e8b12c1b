"""Weights that training goes on from: released checkpoints (`.pth`) and folders in Hugging Face's form, read by name."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.dag.fingerprint import file_digest
from pipeline.errors import LodesetError
from training.config import ModelConfig
from training.export import CONFIG, WEIGHTS, load_backbone
from training.vit import DinoVisionTransformer

# A training checkpoint of the authors' code keeps the backbone under these names, and may number chunks of blocks.
WRAPPERS = ("teacher", "model", "state_dict")
PREFIXES = ("module.", "backbone.")
CHUNKED = re.compile(r"^blocks\.\d+\.(\d+\.)")
COMPARED = ("dim", "depth", "heads", "patch_size", "registers", "ffn")
HEAD = 64  # channels of an attention head in every released model, which their tensors do not tell


def load_weights(path: str, model: ModelConfig) -> DinoVisionTransformer:
    """The backbone in `path`, in evaluation mode, on the CPU; `model` says what it must be, and its drop path.

    A file is a checkpoint of the authors' code: those they released, or the teacher of one they trained. A folder holds what
    `export` wrote, or a published model in Hugging Face's form. Positions keep the grid that they were stored for.

    Raises:
        LodesetError: nothing there, nothing readable, or another architecture than `model`.
    """
    state, image_size = _checked(path, model)
    backbone = DinoVisionTransformer(model, image_size)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise LodesetError(f"{path} is no DINOv2 backbone: {error}") from error
    return backbone.eval()


def check_weights(path: str, model: ModelConfig) -> None:
    """Raises what `load_weights` would raise of the architecture, without a network, and without reading all of a file."""
    _checked(path, model)


def _checked(path: str, model: ModelConfig) -> tuple[dict[str, Tensor], int]:
    """The tensors, and the side, in pixels, of the images that their positions are for."""
    if Path(path).is_dir():
        loaded = load_backbone(Path(path))
        state, found, image_size = loaded.state_dict(), loaded.config, loaded.image_size
    else:
        state = _read(path)
        found, image_size = _architecture(state, model, path)
    different = {name: getattr(found, name) for name in COMPARED if getattr(found, name) != getattr(model, name)}
    if different:
        theirs = ", ".join(f"{name} {value}" for name, value in different.items())
        ours = ", ".join(f"{name} {getattr(model, name)}" for name in different)
        raise LodesetError(
            f"{path} holds another architecture: it has {theirs}; training.model has {ours}: set training.model to it"
        )
    return state, image_size


def identity(path: str) -> str:
    """SHA-256 of the file, or of a folder's two.

    Raises:
        LodesetError: nothing there.
    """
    try:
        if Path(path).is_dir():
            return "+".join(file_digest(str(Path(path) / name)) for name in (WEIGHTS, CONFIG))
        return file_digest(path)
    except OSError as error:
        raise LodesetError(
            f"no weights at {path} ({error.strerror or error}): check `training: weights: path:` "
            "(relative paths start from the configuration file)"
        ) from error


def _read(path: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise LodesetError(f"no weights at {path}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LodesetError(f"{path} is no file of tensors alone that PyTorch can read: {reason}") from error
    while isinstance(state, dict) and (inner := next((state[w] for w in WRAPPERS if w in state), None)) is not None:
        state = inner
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise LodesetError(f"{path} holds no tensors by name: give a released DINOv2 checkpoint, or a folder")
    return {_plain(name): value for name, value in state.items() if not re.match(r"(module\.)?\w+_head\.", name)}


def _plain(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return CHUNKED.sub(r"blocks.\1", name)


def _architecture(state: Mapping[str, Tensor], model: ModelConfig, path: str) -> tuple[ModelConfig, int]:
    """What the tensors say, and the side, in pixels, of the images that the positions are for."""
    try:
        patch = state["patch_embed.proj.weight"].shape[-1]
        dim, tokens = state["cls_token"].shape[-1], state["pos_embed"].shape[1]
        depth = 1 + max(int(match.group(1)) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    except (KeyError, IndexError, ValueError) as error:
        raise LodesetError(f"{path} is no DINOv2 backbone: {error} is missing") from error
    side = round((tokens - 1) ** 0.5)
    if side * side != tokens - 1:
        raise LodesetError(f"{path}: {tokens - 1} positions are no square grid")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    found = model.model_copy(
        update={
            "dim": dim,
            "depth": depth,
            "heads": dim // HEAD,
            "patch_size": patch,
            "registers": registers,
            "ffn": "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp",
        }
    )
    return found, side * patch
