"""Pruned models on disk: `model.safetensors`, and a description of the model to build for it: `architecture.json` for
lodeset's transformers, `graph.json` for other models.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from lodeset.pipeline.dag.fingerprint import digest, file_digest
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.formats.portable import GRAPH, load_portable, save_portable
from lodeset.training.export import CONFIG, WEIGHTS, load_backbone
from lodeset.training.narrow import ARCHITECTURE, load_narrow, save_narrow
from lodeset.training.vit import DinoVisionTransformer


def load_model(folder: str | Path) -> nn.Module:
    """Load a dense or pruned model in evaluation mode on the CPU: written by `export` or `save_pruned`, or a DINOv2 in
    Hugging Face format.

    Raises:
        LodesetError: the folder contains no model, or a damaged one.
    """
    folder = Path(folder)
    for name, load in FORMS.items():
        if (folder / name).is_file():
            try:
                return load(folder)
            except LodesetError:
                raise
            except Exception as error:  # a file from elsewhere may contain anything
                raise LodesetError(f"{folder} does not hold a model: {type(error).__name__}: {error}") from error
    raise LodesetError(
        f"{folder} holds no model: looked for {CONFIG} (a DINOv2 written by lodeset or Hugging Face), {ARCHITECTURE} "
        "(a pruned DINOv2) "
        f"and {GRAPH} (any other model, written by `pruning.formats.portable.save_portable`)"
    )


def digest_of(folder: Path) -> str:
    """SHA-256 of the files that `load_model` reads."""
    return digest([file_digest(str(folder / name)) for name in (WEIGHTS, *FORMS) if (folder / name).is_file()])


def save_pruned(model: nn.Module, folder: Path, example: Tensor) -> None:
    """Write a model that takes images like `example` [B, 3, height, width], so that `load_model` can read it.

    Raises:
        LodesetError: the model computes something that no file can describe (see `save_portable`).
    """
    if not isinstance(model, DinoVisionTransformer):
        save_portable(model, folder, example)
        return
    save_narrow(model, folder)


FORMS: dict[str, Callable[[Path], nn.Module]] = {
    ARCHITECTURE: load_narrow,
    GRAPH: load_portable,
    CONFIG: load_backbone,
}
