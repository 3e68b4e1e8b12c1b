"""Pruned models on disk: `model.safetensors`, and beside it what to build for it: `architecture.json` for lodeset's transformers,
`graph.json` for other models.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.dag.fingerprint import digest, file_digest
from pipeline.errors import LodesetError
from pruning.portable import GRAPH, load_portable, save_portable
from training.config import ModelConfig
from training.export import CONFIG, load_backbone
from training.vit import Attention, DinoVisionTransformer

# Not called config.json: no reader of dense checkpoints may take a pruned one for its own.
WEIGHTS, ARCHITECTURE = "model.safetensors", "architecture.json"


def load_model(folder: Path) -> nn.Module:
    """A dense or pruned model in evaluation mode on the CPU: what `export` or `save_pruned` wrote, or a DINOv2 in Hugging Face's form.

    Raises:
        LodesetError: there is none, or it is damaged.
    """
    for name, load in FORMS.items():
        if (folder / name).is_file():
            try:
                return load(folder)
            except LodesetError:
                raise
            except Exception as error:  # files of strangers may hold anything
                raise LodesetError(f"{folder} does not hold a model: {type(error).__name__}: {error}") from error
    raise LodesetError(
        f"{folder} holds no model: looked for {CONFIG} (a DINOv2 that lodeset or Hugging Face wrote), {ARCHITECTURE} (a pruned one) "
        f"and {GRAPH} (`pruning.portable.save_portable` writes any other)"
    )


def digest_of(folder: Path) -> str:
    """SHA-256 of the files that `load_model` reads."""
    return digest([file_digest(str(folder / name)) for name in (WEIGHTS, *FORMS) if (folder / name).is_file()])


def save_pruned(model: nn.Module, folder: Path, example: Tensor) -> None:
    """Write a model that takes images like those of `example` [B, 3, height, width], so that `load_model` reads it.

    Raises:
        LodesetError: it computes something that no file can tell (see `save_portable`).
    """
    if not isinstance(model, DinoVisionTransformer):
        save_portable(model, folder, example)
        return
    # The dense architecture, and the attention heads that are left; other widths are those of the weights.
    folder.mkdir(parents=True, exist_ok=True)
    architecture = {
        "model": model.config.model_dump(mode="json"),
        "image_size": model.image_size,
        "heads": {name: module.heads for name, module in model.named_modules() if isinstance(module, Attention)},
    }
    (folder / ARCHITECTURE).write_text(json.dumps(architecture, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)


def _transformer(folder: Path) -> DinoVisionTransformer:
    architecture, weights = json.loads((folder / ARCHITECTURE).read_text()), load_file(folder / WEIGHTS)
    config, side = ModelConfig.model_validate(architecture["model"]), architecture["image_size"]
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if config.depth != len(blocks) or not isinstance(side, int) or side < config.patch_size:
        raise ValueError(f"{config.depth} blocks, images of {side!r} pixels; the weights are of {len(blocks)} blocks")
    # Without memory: the weights, which are there, bring their own.
    with torch.device("meta"):
        model = DinoVisionTransformer(config, side)
        for name, heads in architecture["heads"].items():
            module = model.get_submodule(name)
            if not isinstance(module, Attention) or not isinstance(heads, int) or not 0 < heads <= module.heads:
                raise ValueError(f"{heads!r} attention heads in {name}")
            module.heads = heads
        _fit(model, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _fit(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives linear layers the widths of their weights; none is wider than in the dense model."""
    for name, module in model.named_modules():
        weight = weights.get(f"{name}.weight")
        if not isinstance(module, nn.Linear) or weight is None or weight.shape == module.weight.shape:
            continue
        rows, cols = weight.shape
        if rows > module.out_features or cols > module.in_features:
            raise ValueError(f"{name} is {rows} x {cols}, wider than {module.out_features} x {module.in_features}")
        parent, _, own = name.rpartition(".")
        bias = f"{name}.bias" in weights
        setattr(model.get_submodule(parent), own, nn.Linear(cols, rows, bias=bias))


FORMS: dict[str, Callable[[Path], nn.Module]] = {
    ARCHITECTURE: _transformer,
    GRAPH: load_portable,
    CONFIG: load_backbone,
}
