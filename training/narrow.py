"""Transformers that are narrower than their configuration says because they were pruned: storing them, and training
them further.

`architecture.json` holds the dense architecture and the remaining attention heads; other widths follow from the
weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lodeset.pipeline import own
from lodeset.training.config import ModelConfig
from lodeset.training.export import WEIGHTS
from lodeset.training.vit import Attention, DinoVisionTransformer

# Not called config.json, so that no reader of dense checkpoints mistakes a pruned checkpoint for a dense one.
ARCHITECTURE = "architecture.json"


def heads_of(model: nn.Module) -> dict[str, int]:
    """Number of attention heads, by module."""
    return {name: module.heads for name, module in model.named_modules() if isinstance(module, Attention)}


def save_narrow(model: DinoVisionTransformer, folder: Path) -> None:
    """Write `model.safetensors` and `architecture.json` into `folder`."""
    own.mark(folder, "model")
    architecture = {
        "model": model.config.model_dump(mode="json"),
        "image_size": model.image_size,
        "heads": heads_of(model),
    }
    (folder / ARCHITECTURE).write_text(json.dumps(architecture, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)


def load_narrow(folder: Path) -> DinoVisionTransformer:
    """Load what `save_narrow` wrote, in evaluation mode on the CPU.

    Raises:
        OSError, KeyError, ValueError, RuntimeError: the files are damaged.
    """
    architecture, weights = json.loads((folder / ARCHITECTURE).read_text()), load_file(folder / WEIGHTS)
    config, side = ModelConfig.model_validate(architecture["model"]), architecture["image_size"]
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if config.depth != len(blocks) or not isinstance(side, int) or side < config.patch_size:
        raise ValueError(f"{config.depth} blocks, images of {side!r} pixels; the weights are of {len(blocks)} blocks")
    # The meta device allocates no memory: the loaded weights bring their own.
    with torch.device("meta"):
        model = DinoVisionTransformer(config, side)
        narrow(model, architecture["heads"], weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def narrow(model: nn.Module, heads: Mapping[str, int], weights: Mapping[str, Tensor]) -> None:
    """Give a dense transformer these attention heads, and its linear layers the widths of `weights`, whose values are
    not copied.

    Raises:
        ValueError: something would become wider than it was.
    """
    for name, count in heads.items():
        module = model.get_submodule(name)
        if not isinstance(module, Attention) or not isinstance(count, int) or not 0 < count <= module.heads:
            raise ValueError(f"{count!r} attention heads in {name}")
        module.heads = count
    for name, module in list(model.named_modules()):
        weight = weights.get(f"{name}.weight")
        if not isinstance(module, nn.Linear) or weight is None or weight.shape == module.weight.shape:
            continue
        rows, cols = weight.shape
        if rows > module.out_features or cols > module.in_features:
            raise ValueError(f"{name} is {rows} x {cols}, wider than {module.out_features} x {module.in_features}")
        parent, _, own = name.rpartition(".")
        linear = nn.Linear(cols, rows, bias=f"{name}.bias" in weights)
        setattr(model.get_submodule(parent), own, linear)
