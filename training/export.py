"""Export a backbone as `model.safetensors` and `config.json`, which Hugging Face `Dinov2Model` and
`Dinov2WithRegistersModel` load (with the names of their published checkpoints), and `preprocessor_config.json`, which
`AutoImageProcessor` loads.

Other backbones are written in a format of lodeset's own, with the same file names.

On the grid that positions are stored for, all implementations agree to 1e-4. On other grids Hugging Face interpolates
positions by size without antialias, whereas the released models without registers used a scale factor with an offset of
0.1, as `vit.positions` does.

Shapes: D width.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lodeset.pipeline import own
from lodeset.pipeline.embedders.preprocess import IMAGENET_MEAN, IMAGENET_STD
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.references import resolved
from lodeset.training.backbone import Backbone
from lodeset.training.backbones import BACKBONES
from lodeset.training.backbones.kind import BackboneConfig, BackboneKind
from lodeset.training.config import ModelConfig
from lodeset.training.vit import NORM_EPS, DinoVisionTransformer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PLAIN = "lodeset"  # the model_type of backbones that Hugging Face does not know

# (ours, theirs); {n} stands for a block's number. Query, key and value are one matrix in our names and three in theirs.
NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("register_tokens", "embeddings.register_tokens"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.{n}.norm1.", "encoder.layer.{n}.norm1."),
    ("blocks.{n}.attn.query.", "encoder.layer.{n}.attention.attention.query."),
    ("blocks.{n}.attn.key.", "encoder.layer.{n}.attention.attention.key."),
    ("blocks.{n}.attn.value.", "encoder.layer.{n}.attention.attention.value."),
    ("blocks.{n}.attn.proj.", "encoder.layer.{n}.attention.output.dense."),
    ("blocks.{n}.ls1.gamma", "encoder.layer.{n}.layer_scale1.lambda1"),
    ("blocks.{n}.norm2.", "encoder.layer.{n}.norm2."),
    ("blocks.{n}.mlp.fc1.", "encoder.layer.{n}.mlp.fc1."),
    ("blocks.{n}.mlp.fc2.", "encoder.layer.{n}.mlp.fc2."),
    ("blocks.{n}.mlp.w12.", "encoder.layer.{n}.mlp.weights_in."),
    ("blocks.{n}.mlp.w3.", "encoder.layer.{n}.mlp.weights_out."),
    ("blocks.{n}.ls2.gamma", "encoder.layer.{n}.layer_scale2.lambda1"),
    ("norm.", "layernorm."),
)


def export(model: Backbone, folder: str | Path) -> None:
    """Write `model.safetensors` (fp32), `config.json` and `preprocessor_config.json` into `folder`; each file appears
    whole or not at all.
    """
    folder = Path(folder)
    own.mark(folder, "model")
    tensors, config = _hugging_face(model) if isinstance(model, DinoVisionTransformer) else _plain(model)
    weights = folder / f"{WEIGHTS}.tmp"
    save_file(tensors, weights, metadata={"format": "pt"})
    os.replace(weights, folder / WEIGHTS)
    for name, said in ((CONFIG, config), (PREPROCESSOR, _preprocessing(model.image_size))):
        unfinished = folder / f"{name}.tmp"
        unfinished.write_text(json.dumps(said, indent=2) + "\n")
        os.replace(unfinished, folder / name)


def _hugging_face(model: DinoVisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for part_name, part in _split_qkv(name, tensor.detach().float().cpu()):
            tensors[_rename(part_name, to_hugging_face=True)] = part.contiguous()
    return tensors, _hugging_face_config(model)


def _plain(model: Backbone) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Backbones that no library knows: weights under their own names, and the settings that build the network again."""
    assert isinstance(model.config, BackboneConfig)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    said = {"model_type": PLAIN, "backbone": model.config.model_dump(mode="json"), "image_size": model.image_size}
    return tensors, said


def _load_plain(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Backbone:
    """Raises KeyError, RuntimeError, ValueError or TypeError: they do not fit."""
    settings = said["backbone"]
    reference = BACKBONES.get(settings["kind"])
    if reference is None:
        raise ValueError(f"no such backbone: {settings['kind']!r}; there are {', '.join(BACKBONES)}")
    kind: BackboneKind = resolved(reference)
    model = kind.build(kind.config.model_validate(settings), said["image_size"])
    model.load_state_dict(dict(tensors))
    return model


def _preprocessing(size: int) -> dict[str, Any]:
    """The preprocessing of evaluation: the center square of `size` pixels, normalized as in training."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def load_backbone(folder: str | Path) -> Backbone:
    """Load a backbone in evaluation mode on the CPU: written by `export`, or a published DINOv2 in Hugging Face format.

    Raises:
        LodesetError: a file is missing or damaged, or the weights do not match the configuration.
    """
    folder = Path(folder)
    try:
        said = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise LodesetError(f"{error.filename or folder} does not exist: export a model there first") from error
    except (ValueError, SafetensorError) as error:
        raise LodesetError(f"{folder} holds no readable {WEIGHTS} and {CONFIG}: {error}") from error
    model: Backbone
    try:
        if isinstance(said, dict) and said.get("model_type") == PLAIN:
            return _load_plain(said, tensors).eval()
        side, blocks = said["image_size"], {n.split(".")[2] for n in tensors if n.startswith("encoder.layer.")}
        if said["num_hidden_layers"] != len(blocks) or not isinstance(side, int) or side < said["patch_size"]:
            raise ValueError(
                f"{said['num_hidden_layers']} layers of images of {side!r} pixels, and weights of {len(blocks)} layers"
            )
        model = DinoVisionTransformer(
            ModelConfig(
                patch_size=said["patch_size"],
                dim=said["hidden_size"],
                depth=said["num_hidden_layers"],
                heads=said["num_attention_heads"],
                ffn="swiglu" if said["use_swiglu_ffn"] else "mlp",
                registers=said.get("num_register_tokens", 0),
                layerscale=said["layerscale_value"],
            ),
            side,
        )
        model.load_state_dict(_join_qkv({_rename(name, to_hugging_face=False): t for name, t in tensors.items()}))
    except KeyError as error:
        raise LodesetError(f"{folder / CONFIG} lacks {error}: it is not a configuration of a backbone") from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise LodesetError(f"{folder}: the weights do not match the configuration: {error}") from error
    return model.eval()


def _hugging_face_config(model: DinoVisionTransformer) -> dict[str, Any]:
    config = model.config
    registers = bool(config.registers)
    fields: dict[str, Any] = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "image_size": model.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "use_swiglu_ffn": config.ffn == "swiglu",
        "qkv_bias": True,
        "layer_norm_eps": NORM_EPS,
        "layerscale_value": config.layerscale,
        "torch_dtype": "float32",
    }
    return fields | ({"num_register_tokens": config.registers} if registers else {})


def _split_qkv(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if ".qkv." not in name:
        return [(name, tensor)]
    parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
    return [(name.replace(".qkv.", f".{part}."), chunk) for part, chunk in parts]


def _join_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.(query|key|value)\.", name)}
    for name, query in tensors.items():
        if ".query." in name:
            parts = [query, *(tensors[name.replace(".query.", f".{part}.")] for part in ("key", "value"))]
            joined[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return joined


def _rename(name: str, to_hugging_face: bool) -> str:
    for ours, theirs in NAMES:
        old, new = (ours, theirs) if to_hugging_face else (theirs, ours)
        match = re.match(re.escape(old).replace(r"\{n\}", r"(\d+)"), name)
        if match:
            number = match.group(1) if match.groups() else ""
            return new.replace("{n}", number) + name[match.end() :]
    raise ValueError(f"unknown parameter {name}")
