"""The kinds of embedders that come with lodeset. Their libraries are imported when a network is loaded: the configuration is made of
these kinds, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lodeset.pipeline.dag.files import reaching
from lodeset.pipeline.dag.fingerprint import file_digest
from lodeset.pipeline.embedders import Embed, EmbedderKind, Knobs, identity_by_file, knobs_of
from lodeset.pipeline.embedders.config import (
    HuggingFaceEmbedder,
    OnnxEmbedder,
    PatchDictionary,
    PrecomputedEmbedder,
    TorchScriptEmbedder,
)
from lodeset.pipeline.embedders.hub import located, model_files, on_hub
from lodeset.pipeline.shown import shown


def _onnx(config: OnnxEmbedder, threads: int) -> Embed:
    from lodeset.pipeline.embedders.onnx import onnx

    return onnx(config, threads)


def _torchscript(config: TorchScriptEmbedder, threads: int) -> Embed:
    from lodeset.pipeline.embedders.networks import torchscript

    return torchscript(config, threads)


def _hugging_face(config: HuggingFaceEmbedder, threads: int) -> Embed:
    from lodeset.pipeline.embedders.huggingface import huggingface

    return huggingface(config, threads)


def _onnx_on_gpu() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _torch_on_gpu() -> bool:
    import torch

    return bool(torch.version.cuda or torch.version.hip)


def _onnx_identity(config: OnnxEmbedder) -> Mapping[str, Any]:
    # What the configuration leaves to the file, the file's digest says.
    tree = {name: value for name, value in identity_by_file(config).items() if value is not None}
    if weights := _external_weights(Path(config.path)):
        tree["weights"] = {name: file_digest(str(path)) for name, path in weights.items()}
    return tree


def _external_weights(model: Path) -> dict[str, Path]:
    """The files beside an ONNX model in which its larger tensors lie (above 2 GB they must), by relative path.

    The model holds their relative paths as plain text, so a file is one of them if its path occurs in the model.
    """
    told = model.read_bytes()
    beside = {
        path.relative_to(model.parent).as_posix(): path for path in sorted(model.parent.glob("**/*")) if path != model
    }
    return {name: path for name, path in beside.items() if path.is_file() and name.encode() in told}


def _hub_identity(config: HuggingFaceEmbedder) -> Mapping[str, Any]:
    # By their bytes, so that a snapshot of the hub and a copy of its folder are one model.
    folder = located(config)
    return knobs_of(config) | {"files": {name: file_digest(str(folder / name)) for name in model_files(folder)}}


def _hub_name(config: HuggingFaceEmbedder) -> str:
    return f"{config.model}@{config.revision}" if config.revision else config.model


def _hub_pinned(config: HuggingFaceEmbedder) -> Knobs:
    """A model of Hugging Face's hub is fetched, and named by its commit."""
    return config.model_copy(update={"revision": located(config).name}) if on_hub(config) else config


def _vectors_identity(config: PrecomputedEmbedder) -> Mapping[str, Any]:
    from lodeset.pipeline.embedders import precomputed

    # Terabytes of vectors cannot be read for every `plan`: sizes and times say whether they changed.
    with reaching(f"embed: {shown(config.path)}"):
        fs, paths = precomputed.files_of(config)
    return knobs_of(config) | {"version": precomputed.VERSION, "files": [_state(fs, path) for path in paths]}


def _state(fs: Any, path: str) -> list[object]:
    """Name, size and entity tag or modification time of a file."""
    info = fs.info(path)
    times = ("ETag", "etag", "mtime", "LastModified", "last_modified")
    return [path.rsplit("/", 1)[-1], info["size"], next((str(info[t]) for t in times if info.get(t) is not None), "")]


def _looked_up(config: PrecomputedEmbedder, threads: int) -> Embed:
    raise TypeError("precomputed vectors are looked up, not computed")


def _unfitted(config: PatchDictionary, threads: int) -> Embed:
    raise TypeError("a patch dictionary is fitted before it embeds")


PATCH_DICTIONARY = EmbedderKind(
    knobs=PatchDictionary, load=_unfitted, identity=knobs_of, name=lambda config: config.kind
)
ONNX = EmbedderKind(knobs=OnnxEmbedder, load=_onnx, identity=_onnx_identity, on_gpu=_onnx_on_gpu)
TORCHSCRIPT = EmbedderKind(knobs=TorchScriptEmbedder, load=_torchscript, on_gpu=_torch_on_gpu)
HUGGING_FACE = EmbedderKind(
    knobs=HuggingFaceEmbedder,
    load=_hugging_face,
    identity=_hub_identity,
    name=_hub_name,
    on_gpu=_torch_on_gpu,
    pinned=_hub_pinned,
)
PRECOMPUTED = EmbedderKind(knobs=PrecomputedEmbedder, load=_looked_up, identity=_vectors_identity)
