"""What a configured embedder is: its model pinned to one version, its name, and its identity in fingerprints. Loads no network."""

from __future__ import annotations

from typing import Any

from lodeset.pipeline.embedders import Knobs
from lodeset.pipeline.embedders.kinds import kind_of
from lodeset.pipeline.errors import LodesetError


def pinned(config: Knobs) -> Knobs:
    """The embedder with its model made unmistakable: one of Hugging Face's hub is fetched, and named by its commit.

    Raises:
        LodesetError: there is no such model, or the hub cannot be reached.
    """
    return kind_of(config).pinned(config)


def name_of(config: Knobs) -> str:
    """What messages and manifests call an embedder: its model's place, with the commit of one from the hub."""
    return kind_of(config).name(config)


def identity(config: Knobs, key: str = "embed") -> dict[str, Any]:
    """What enters fingerprints: every knob but places and batch sizes, and the digest of the model's bytes.

    Raises:
        LodesetError: the model is not there; it names `key`, the model's place in the configuration.
    """
    try:
        return dict(kind_of(config).identity(config))
    except FileNotFoundError as error:
        what = "embedder" if key == "embed" else "model"
        raise LodesetError(
            f"no {what}: {error}; check `{key}: path:` (relative paths start from the configuration file)"
        ) from None
    except OSError as error:
        raise LodesetError(f"the model cannot be read: {error}; check `{key}: path:`") from error
