"""Weights that training goes on from: released checkpoints (`.pth`) and folders in Hugging Face's form, read by name."""

import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lodeset.pipeline.dag.fingerprint import file_digest
from lodeset.pipeline.errors import LodesetError
from lodeset.training.config import ModelConfig
from lodeset.training.export import CONFIG, WEIGHTS, load_backbone
from lodeset.training.vit import DinoVisionTransformer

# What FSDP, torch.compile, activation checkpoints and DistributedDataParallel put between the names of a network's parts.
WRAPPERS = ("module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "_forward_module")
FIRST = (
    "patch_embed.proj.weight"  # every backbone has it: what stands before it says which network of a file it belongs to
)
HEAD_NAME = re.compile(r"(\w+_)?head\.")
CHUNKED = re.compile(r"^blocks\.\d+\.(\d+\.)")
NESTED = 8  # mappings within mappings that are looked through
COMPARED = ("dim", "depth", "heads", "patch_size", "registers", "ffn")
HEAD = 64  # channels of an attention head in every released model, which their tensors do not tell


def load_weights(path: str, model: ModelConfig) -> DinoVisionTransformer:
    """The backbone in `path`, in evaluation mode, on the CPU; `model` says what it must be, and its drop path.

    A file is a checkpoint of the authors' code: those they released, or one that a run of theirs left, whose teacher is taken; it
    may have been wrapped by FSDP, torch.compile or DistributedDataParallel. A folder holds what `export` wrote, or a published model
    in Hugging Face's form. Positions keep the grid that they were stored for.

    Raises:
        LodesetError: nothing there, nothing readable, or another architecture than `model`.
    """
    state, image_size = _checked(path, model)
    backbone = DinoVisionTransformer(model, image_size)
    backbone.load_state_dict(state)
    return backbone.eval()


def check_weights(path: str, model: ModelConfig) -> None:
    """Raises what `load_weights` would raise, without making a network, and without reading all of a file."""
    _checked(path, model)


def _checked(path: str, model: ModelConfig) -> tuple[dict[str, Tensor], int]:
    """The tensors, and the side, in pixels, of the images that their positions are for."""
    if Path(path).is_dir():
        files = sorted(file.name for file in Path(path).glob("*.pth"))
        if files and not (Path(path) / CONFIG).is_file():
            raise LodesetError(
                f"{path} holds no {WEIGHTS} with its {CONFIG}, but {', '.join(files[:3])}: give such a file itself"
            )
        loaded = load_backbone(path)
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
    with torch.device("meta"):
        wanted = DinoVisionTransformer(model, image_size).state_dict()
    odd = [f"{name} is missing" for name in wanted if name not in state]
    odd += [f"{name} is no part of one" for name in state if name not in wanted]
    odd += [
        f"{name} is {list(state[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if odd:
        more = f", and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise LodesetError(f"{path} is no DINOv2 backbone: {'; '.join(odd[:3])}{more}")
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
    """The tensors of the backbone in a file, by the names that ours has."""
    found = dict(_named(_loaded(path)))
    if not found:
        raise LodesetError(f"{path} holds no tensors by name: give a released DINOv2 checkpoint, or a folder")
    roots = {name.removesuffix(FIRST) for name in found if name == FIRST or name.endswith(f".{FIRST}")}
    if not roots:
        if any("_flat_param" in name for name in found):
            raise LodesetError(
                f"{path} holds one process's share of a network that FSDP cut up: give the teacher_checkpoint.pth that the same run "
                "wrote below eval/, or a full state dict"
            )
        told = ", ".join(sorted(found)[:3])
        raise LodesetError(f"{path} is no DINOv2 backbone: {FIRST} is missing among {len(found)} tensors ({told}, ...)")
    root = _chosen(roots, path)
    inside = {name.removeprefix(root): value for name, value in found.items() if name.startswith(root)}
    others = tuple(other.removeprefix(root) for other in roots if other != root and other.startswith(root))
    return {
        CHUNKED.sub(r"blocks.\1", name): value
        for name, value in inside.items()
        if not HEAD_NAME.match(name) and not name.startswith(others)
    }


def _loaded(path: str) -> object:
    if path.endswith(".safetensors"):
        if (Path(path).parent / CONFIG).is_file():
            raise LodesetError(
                f"{path} is one of two files of a model in Hugging Face's form: give the folder, {Path(path).parent}"
            )
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise LodesetError(f"{path} cannot be read: {error}") from error
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the form that torch.save wrote before version 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LodesetError(f"no weights at {path}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LodesetError(f"{path} is no file of tensors alone that PyTorch can read: {reason}") from error


def _named(tree: object, before: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of mappings within mappings by its dotted name, without what wraps a network; other values are passed over."""
    if not isinstance(tree, Mapping) or depth > NESTED:
        return
    for name, value in tree.items():
        whole = f"{before}{name}"
        if isinstance(value, Tensor):
            yield ".".join(piece for piece in whole.split(".") if piece not in WRAPPERS), value
        else:
            yield from _named(value, f"{whole}.", depth + 1)


def _chosen(roots: Collection[str], path: str) -> str:
    """Of the networks in a file the teacher, another average of weights, what bears no such name, or the student, in this order."""

    def rank(root: str) -> int:
        words = re.findall(r"[a-z]+", root.lower())
        return ("teacher" in words, "ema" in words, "student" not in words, True).index(True)

    best = min(map(rank, roots))
    first, *others = sorted((root for root in roots if rank(root) == best), key=lambda root: (root.count("."), root))
    # `backbone.` and `backbone.something.`: the inner one is a part of the outer.
    rivals = [other for other in others if not other.startswith(first)] if first else []
    if rivals:
        told = ", ".join(f"`{root}{FIRST}`" for root in (first, *rivals[:3]))
        raise LodesetError(f"{path} holds several backbones ({told}): save the one that is meant in a file of its own")
    return first


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
