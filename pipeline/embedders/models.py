"""What a configured embedder is: its model pinned to one version, its name, and its identity in fingerprints. Loads no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lodeset.pipeline.dag.files import reaching
from lodeset.pipeline.dag.fingerprint import file_digest
from lodeset.pipeline.embedders import precomputed
from lodeset.pipeline.embedders.config import (
    AnyEmbedder,
    HuggingFaceEmbedder,
    OnnxEmbedder,
    PatchDictionary,
    PrecomputedEmbedder,
)
from lodeset.pipeline.embedders.hub import located, model_files, on_hub
from lodeset.pipeline.embedders.precomputed import files_of
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown

# Knobs that say where the model lies or how fast it runs, not what it computes.
_PLACES = ("path", "model", "revision", "batch")


def pinned(config: AnyEmbedder) -> AnyEmbedder:
    """The embedder with its model made unmistakable: one of Hugging Face's hub is fetched, and named by its commit.

    Raises:
        LodesetError: there is no such model, or the hub cannot be reached.
    """
    if isinstance(config, HuggingFaceEmbedder) and on_hub(config):
        return config.model_copy(update={"revision": located(config).name})
    return config


def name_of(config: AnyEmbedder) -> str:
    """What messages and manifests call an embedder: its model's place, with the commit of one from the hub."""
    if isinstance(config, HuggingFaceEmbedder):
        return f"{config.model}@{config.revision}" if config.revision else config.model
    return config.kind if isinstance(config, PatchDictionary) else config.path


def identity(config: AnyEmbedder, key: str = "embed") -> dict[str, Any]:
    """What enters fingerprints: every knob but places and batch sizes, and the digest of the model's bytes.

    Raises:
        LodesetError: the model is not there; it names `key`, the model's place in the configuration.
    """
    tree = {k: v for k, v in config.model_dump().items() if k not in _PLACES}
    try:
        if isinstance(config, PrecomputedEmbedder):
            # Terabytes of vectors cannot be read for every `plan`: sizes and times say whether they changed.
            with reaching(f"{key}: {shown(config.path)}"):
                fs, paths = files_of(config)
            tree |= {"version": precomputed.VERSION, "files": [_state(fs, path) for path in paths]}
        elif isinstance(config, HuggingFaceEmbedder):
            # By their bytes, so that a snapshot of the hub and a copy of its folder are one model.
            folder = located(config)
            tree["files"] = {name: file_digest(str(folder / name)) for name in model_files(folder)}
        elif not isinstance(config, PatchDictionary):
            tree["model"] = file_digest(config.path)
            if isinstance(config, OnnxEmbedder):
                # What the configuration leaves to the file, the file's digest says.
                tree = {name: value for name, value in tree.items() if value is not None}
                if weights := _external_weights(Path(config.path)):
                    tree["weights"] = {name: file_digest(str(path)) for name, path in weights.items()}
    except FileNotFoundError as error:
        what = "embedder" if key == "embed" else "model"
        raise LodesetError(
            f"no {what}: {error}; check `{key}: path:` (relative paths start from the configuration file)"
        ) from None
    except OSError as error:
        raise LodesetError(f"the model cannot be read: {error}; check `{key}: path:`") from error
    return tree


def _state(fs: Any, path: str) -> list[object]:
    """Name, size and entity tag or modification time of a file."""
    info = fs.info(path)
    times = ("ETag", "etag", "mtime", "LastModified", "last_modified")
    return [path.rsplit("/", 1)[-1], info["size"], next((str(info[t]) for t in times if info.get(t) is not None), "")]


def _external_weights(model: Path) -> dict[str, Path]:
    """The files beside an ONNX model in which its larger tensors lie (above 2 GB they must), by relative path.

    The model holds their relative paths as plain text, so a file is one of them if its path occurs in the model.
    """
    told = model.read_bytes()
    beside = {
        path.relative_to(model.parent).as_posix(): path for path in sorted(model.parent.glob("**/*")) if path != model
    }
    return {name: path for name, path in beside.items() if path.is_file() and name.encode() in told}
