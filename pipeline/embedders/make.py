"""Turn the configuration of an embedder into the embedding function."""

from __future__ import annotations

import numpy as np

from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.embedders import Embed, huggingface, networks, onnx, patches
from lodeset.pipeline.embedders.config import (
    AnyEmbedder,
    HuggingFaceEmbedder,
    OnnxEmbedder,
    PatchDictionary,
    TorchScriptEmbedder,
)


def runs_on_gpu(config: AnyEmbedder) -> bool:
    """Whether the installed libraries would run this embedder on a GPU if its worker has one."""
    if isinstance(config, OnnxEmbedder):
        import onnxruntime

        return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if isinstance(config, TorchScriptEmbedder | HuggingFaceEmbedder):
        import torch

        return bool(torch.version.cuda or torch.version.hip)
    return False


def load(config: AnyEmbedder, fitted: File | None, store: Store, threads: int) -> Embed:
    """The embedding function of one worker."""
    if isinstance(config, OnnxEmbedder):
        return onnx.onnx(config, threads)
    if isinstance(config, TorchScriptEmbedder):
        return networks.torchscript(config, threads)
    if isinstance(config, HuggingFaceEmbedder):
        return huggingface.huggingface(config, threads)
    if isinstance(config, PatchDictionary):
        assert fitted is not None, "a patch dictionary is fitted before it embeds"
        with store.opened(fitted) as file, np.load(file, allow_pickle=False) as arrays:
            return patches.embedder(patches.Dictionary.from_arrays(dict(arrays)), config)
    raise TypeError("precomputed vectors are looked up, not computed")
