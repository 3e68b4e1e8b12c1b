"""The identity of a configured embedder: its model pinned to one version, its name, and its part of fingerprints. Loads
no network.
"""

from __future__ import annotations

from typing import Any

from lodeset.pipeline.embedders import Knobs
from lodeset.pipeline.embedders.kinds import kind_of
from lodeset.pipeline.errors import LodesetError


def pinned(config: Knobs) -> Knobs:
    """The embedder with a definite model: a model from Hugging Face's hub is downloaded and named by its commit.

    Raises:
        LodesetError: there is no such model, or the hub cannot be reached.
    """
    return kind_of(config).pinned(config)


def name_of(config: Knobs) -> str:
    """The name of an embedder in messages and manifests: the model's location, with the commit if it is from the
    hub.
    """
    return kind_of(config).name(config)


def identity(config: Knobs, key: str = "embed") -> dict[str, Any]:
    """The part of the configuration that enters fingerprints: all settings except locations and batch sizes, and the
    digest of the model's bytes.

    Raises:
        LodesetError: the model does not exist; the message names `key`, its place in the configuration.
    """
    try:
        return dict(kind_of(config).identity(config))
    except FileNotFoundError as error:
        kind = "embedder" if key == "embed" else "model"
        raise LodesetError(
            f"no {kind}: {error}; check `{key}: path:` (relative paths start from the configuration file)"
        ) from None
    except OSError as error:
        raise LodesetError(f"the model cannot be read: {error}; check `{key}: path:`") from error
