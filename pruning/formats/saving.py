"""Pruned models on disk: `model.safetensors`, and beside it what to build for it: `architecture.json` for lodeset's transformers,
`graph.json` for other models.
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
    """A dense or pruned model in evaluation mode on the CPU: what `export` or `save_pruned` wrote, or a DINOv2 in Hugging Face's form.

    Raises:
        LodesetError: there is none, or it is damaged.
    """
    folder = Path(folder)
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
    save_narrow(model, folder)


FORMS: dict[str, Callable[[Path], nn.Module]] = {
    ARCHITECTURE: load_narrow,
    GRAPH: load_portable,
    CONFIG: load_backbone,
}
