"""A configured embedder -> the function that embeds, and what it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.config import OnnxEmbedder, PatchDictionary, PrecomputedEmbedder, TorchScriptEmbedder
from pipeline.dag.fingerprint import file_digest
from pipeline.dag.store import File, Store
from pipeline.embedders import Embed, networks, patches
from pipeline.embedders.precomputed import files_of
from pipeline.errors import LodesetError

AnyEmbedder = PatchDictionary | OnnxEmbedder | TorchScriptEmbedder | PrecomputedEmbedder

# Knobs that say where the model lies or how fast it runs, not what it computes.
_PLACES = ("path", "batch")


def identity(config: AnyEmbedder) -> dict[str, Any]:
    """What enters fingerprints: every knob but places and batch sizes, and the digest of the model's bytes."""
    tree = {k: v for k, v in config.model_dump().items() if k not in _PLACES}
    try:
        if isinstance(config, PrecomputedEmbedder):
            tree["files"] = [file_digest(path) for path in files_of(config)]
        elif not isinstance(config, PatchDictionary):
            tree["model"] = file_digest(config.path)
    except FileNotFoundError as error:
        raise LodesetError(
            f"no embedder: {error}; check `embed: path:` (relative paths start from the configuration file)"
        ) from None
    except OSError as error:
        raise LodesetError(f"the embedder cannot be read: {error}; check `embed: path:`") from error
    return tree


def load(config: AnyEmbedder, fitted: File | None, store: Store, threads: int) -> Embed:
    """The embedding function of one worker."""
    if isinstance(config, OnnxEmbedder):
        return networks.onnx(config, threads)
    if isinstance(config, TorchScriptEmbedder):
        return networks.torchscript(config, threads)
    if isinstance(config, PatchDictionary):
        import faiss

        faiss.omp_set_num_threads(threads)
        assert fitted is not None, "a patch dictionary is fitted before it embeds"
        with store.fs.open(store.path(fitted.path), "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return patches.embedder(patches.Dictionary.from_arrays(dict(arrays)), config)
    raise TypeError("precomputed vectors are looked up, not computed")
