"""Weights that training starts from: released checkpoints (`.pth`) and folders in Hugging Face format, read by name."""

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

# Prefixes that FSDP, torch.compile, activation checkpointing and DistributedDataParallel insert into parameter names.
WRAPPERS = ("module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "_forward_module")
FIRST = "patch_embed.proj.weight"  # in every backbone; its prefix shows which network of a file it belongs to
HEAD_NAME = re.compile(r"(\w+_)?head\.")
CHUNKED = re.compile(r"^blocks\.\d+\.(\d+\.)")
NESTED = 8  # maximum depth of nested mappings that are searched
COMPARED = ("dim", "depth", "heads", "patch_size", "registers", "ffn")
HEAD = 64  # channels of an attention head in every released model, which do not follow from the tensors


def load_weights(path: str, model: ModelConfig) -> DinoVisionTransformer:
    """Load the backbone in `path`, in evaluation mode on the CPU; `model` is the required architecture, and gives the
    drop path.

    A file is a checkpoint of the authors' code: a released one, or one of a run, whose teacher is used; it may have
    been wrapped by FSDP, torch.compile or DistributedDataParallel. A folder holds what `export` wrote, or a published
    model in Hugging Face format. Positions keep the grid that they were stored for.

    Raises:
        LodesetError: nothing exists there or can be read, or the architecture differs from `model`.
    """
    state, image_size = _checked(path, model)
    backbone = DinoVisionTransformer(model, image_size)
    backbone.load_state_dict(state)
    return backbone.eval()


def check_weights(path: str, model: ModelConfig) -> None:
    """Raise what `load_weights` would raise, without making a network and without reading a whole file."""
    _checked(path, model)


def _checked(path: str, model: ModelConfig) -> tuple[dict[str, Tensor], int]:
    """The tensors, and the side, in pixels, of the images that their positions are for."""
    if Path(path).is_dir():
        files = sorted(file.name for file in Path(path).glob("*.pth"))
        if files and not (Path(path) / CONFIG).is_file():
            raise LodesetError(
                f"{path} holds no {WEIGHTS} with its {CONFIG}, but {', '.join(files[:3])}: give the path of such a file"
            )
        loaded = load_backbone(path)
        if not isinstance(loaded, DinoVisionTransformer):
            raise LodesetError(
                f"{path} holds a {type(loaded).__name__}: training.weights continues from Vision Transformers alone"
            )
        state, stored, image_size = loaded.state_dict(), loaded.config, loaded.image_size
    else:
        state = _read(path)
        stored, image_size = _architecture(state, model, path)
    different = {name: getattr(stored, name) for name in COMPARED if getattr(stored, name) != getattr(model, name)}
    if different:
        theirs = ", ".join(f"{name} {value}" for name, value in different.items())
        ours = ", ".join(f"{name} {getattr(model, name)}" for name in different)
        raise LodesetError(
            f"{path} holds another architecture: it has {theirs}; training.model has {ours}: change training.model to "
            "match"
        )
    with torch.device("meta"):
        wanted = DinoVisionTransformer(model, image_size).state_dict()
    odd = [f"{name} is missing" for name in wanted if name not in state]
    odd += [f"{name} does not belong to one" for name in state if name not in wanted]
    odd += [
        f"{name} is {list(state[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if odd:
        more = f", and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise LodesetError(f"{path} is not a DINOv2 backbone: {'; '.join(odd[:3])}{more}")
    return state, image_size


def identity(path: str) -> str:
    """SHA-256 of the file, or of the two files of a folder.

    Raises:
        LodesetError: nothing exists there.
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
    """The tensors of the backbone in a file, by our parameter names."""
    named = dict(_named(_loaded(path)))
    if not named:
        raise LodesetError(f"{path} holds no named tensors: give a released DINOv2 checkpoint, or a folder")
    roots = {name.removesuffix(FIRST) for name in named if name == FIRST or name.endswith(f".{FIRST}")}
    if not roots:
        if any("_flat_param" in name for name in named):
            raise LodesetError(
                f"{path} holds one process's share of a network that FSDP sharded: give the teacher_checkpoint.pth "
                "that the same run wrote below eval/, or a full state dict"
            )
        examples = ", ".join(sorted(named)[:3])
        raise LodesetError(
            f"{path} is not a DINOv2 backbone: {FIRST} is missing among {len(named)} tensors ({examples}, ...)"
        )
    root = _chosen(roots, path)
    inside = {name.removeprefix(root): value for name, value in named.items() if name.startswith(root)}
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
                f"{path} is one of two files of a model in Hugging Face format: give the folder, {Path(path).parent}"
            )
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise LodesetError(f"{path} cannot be read: {error}") from error
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format that torch.save wrote before version 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LodesetError(f"no weights at {path}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LodesetError(f"{path} could not be loaded with weights_only=True: {reason}") from error


def _named(tree: object, before: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested mappings by its dotted name, without wrapper prefixes; other values are skipped."""
    if not isinstance(tree, Mapping) or depth > NESTED:
        return
    for name, value in tree.items():
        whole = f"{before}{name}"
        if isinstance(value, Tensor):
            yield ".".join(piece for piece in whole.split(".") if piece not in WRAPPERS), value
        else:
            yield from _named(value, f"{whole}.", depth + 1)


def _chosen(roots: Collection[str], path: str) -> str:
    """Choose among the networks of a file: the teacher, another average of weights, one without such a name, or the
    student, in this order.
    """

    def rank(root: str) -> int:
        words = re.findall(r"[a-z]+", root.lower())
        return ("teacher" in words, "ema" in words, "student" not in words, True).index(True)

    best = min(map(rank, roots))
    first, *others = sorted((root for root in roots if rank(root) == best), key=lambda root: (root.count("."), root))
    # `backbone.` and `backbone.something.`: the inner one is a part of the outer.
    rivals = [other for other in others if not other.startswith(first)] if first else []
    if rivals:
        names = ", ".join(f"`{root}{FIRST}`" for root in (first, *rivals[:3]))
        raise LodesetError(f"{path} holds several backbones ({names}): save the one that you want in a file of its own")
    return first


def _architecture(state: Mapping[str, Tensor], model: ModelConfig, path: str) -> tuple[ModelConfig, int]:
    """The architecture of the tensors, and the side, in pixels, of the images that the positions are for."""
    try:
        patch = state["patch_embed.proj.weight"].shape[-1]
        dim, tokens = state["cls_token"].shape[-1], state["pos_embed"].shape[1]
        depth = 1 + max(int(match.group(1)) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    except (KeyError, IndexError, ValueError) as error:
        raise LodesetError(f"{path} is not a DINOv2 backbone: {error} is missing") from error
    side = round((tokens - 1) ** 0.5)
    if side * side != tokens - 1:
        raise LodesetError(f"{path}: {tokens - 1} positions do not form a square grid")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    architecture = model.model_copy(
        update={
            "dim": dim,
            "depth": depth,
            "heads": dim // HEAD,
            "patch_size": patch,
            "registers": registers,
            "ffn": "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp",
        }
    )
    return architecture, side * patch
