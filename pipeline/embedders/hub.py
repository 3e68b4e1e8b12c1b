"""Locate a Hugging Face model and list its files: a local folder, or a snapshot in the hub's cache.

Weights are only read from safetensors: loading a pickle runs code.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lodeset.pipeline.embedders.config import HuggingFaceEmbedder
from lodeset.pipeline.errors import LodesetError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
INSTALL = "Hugging Face models need transformers: pip install -e '.[hf]'"


def located(config: HuggingFaceEmbedder) -> Path:
    """The model's folder. A model in the hub's cache is used as it is; otherwise it is downloaded.

    Raises:
        LodesetError: the model is neither here nor available, or its weights are not safetensors.
    """
    folder = Path(config.model)
    if folder.is_dir():
        if config.revision is not None:
            raise LodesetError(
                f"{folder} is a folder, and a folder has no revision {config.revision}: remove `embed: revision:`"
            )
        model_files(folder)
        return folder
    if not _NAME.fullmatch(config.model):
        raise LodesetError(
            f"no model folder at {config.model}: check `embed: model:` (relative paths start from the configuration "
            "file)"
        )
    snapshot = _snapshot(config, local=True) or _snapshot(config, local=False)
    assert snapshot is not None, "a download returns or raises"
    return snapshot


def on_hub(config: HuggingFaceEmbedder) -> bool:
    """Whether `model` is a name on the hub instead of a folder."""
    return not Path(config.model).is_dir()


def _snapshot(config: HuggingFaceEmbedder, local: bool) -> Path | None:
    """The snapshot's folder, whose name is its commit; None if only a `local` one is allowed and it is not complete."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise LodesetError(f"{config.model}: {INSTALL} ({error})") from None
    named = f"{config.model}@{config.revision}" if config.revision else config.model
    try:
        path = huggingface_hub.snapshot_download(
            config.model,
            revision=config.revision,
            allow_patterns=[CONFIG, PREPROCESSOR, WEIGHTS, INDEX, "*.safetensors"],
            local_files_only=local,
        )
        model_files(Path(path))
        return Path(path)
    except LodesetError:
        if local:
            return None  # a snapshot that another program downloaded partially
        raise
    except errors.LocalEntryNotFoundError as error:
        if local:
            return None
        raise LodesetError(
            f"there is no folder {config.model}, and no model of this name in Hugging Face's cache; the hub cannot be "
            f"reached ({_first(error)}). Without a network, run `hf download {config.model}` on a machine that has "
            "one, copy the snapshot's folder here, and give its path as `embed: model:`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise LodesetError(
            f"the hub has no model {named}, or it requires a login (`hf auth login`, or HF_TOKEN); and there is no "
            f"folder of that name next to the configuration file: {_first(error)}"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise LodesetError(f"{named} could not be downloaded from the hub: {_first(error)}") from None


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def model_files(folder: Path) -> tuple[str, ...]:
    """The files that determine what the model computes, by name: configuration, preprocessing, weights.

    Raises:
        LodesetError: names the missing files, and the pickles that exist instead.
    """
    if not (folder / CONFIG).is_file():
        raise LodesetError(
            f"{folder} has no {CONFIG}: every Hugging Face model has one, and so does what `training` exports"
        )
    if (folder / WEIGHTS).is_file():
        weights = [WEIGHTS]
    elif (folder / INDEX).is_file():
        weights = [INDEX, *sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))]
        absent = [name for name in weights if "/" in name or not (folder / name).is_file()]
        if absent:
            raise LodesetError(f"{folder} lacks {', '.join(absent[:3])}, weights that {INDEX} lists")
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        only = (
            f", only {', '.join(pickles[:3])}: pickles are refused because they run code when loaded" if pickles else ""
        )
        raise LodesetError(
            f"{folder} has no {WEIGHTS}{only}. Convert a model that you trust with AutoModel.from_pretrained(...)"
            ".save_pretrained(FOLDER), which writes safetensors"
        )
    return (CONFIG, *([PREPROCESSOR] if (folder / PREPROCESSOR).is_file() else []), *weights)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping.

    Raises:
        LodesetError: the file is not a JSON mapping.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LodesetError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise LodesetError(f"{path} holds a {type(tree).__name__}, not a mapping")
    return tree
