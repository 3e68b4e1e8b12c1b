"""The configuration that pods read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lodeset.infra.jobs.bundle import resolved
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.shown import shown

_SHOWN = 5


def portable(path: Path, overrides: tuple[str, ...], mounted: Sequence[str]) -> str:
    """A configuration as text, with all overrides applied.

    Args:
        mounted: the paths that exist on the other machine, too.

    Raises:
        ConfigError: a path lies elsewhere, or the text holds a credential.
    """
    sent = resolved(path, overrides)
    places = [(key, os.path.normpath(place.removeprefix("file://"))) for key, place in sent.local]
    lost = [
        f"{key}: {place}"
        for key, place in places
        if not any(place == root or place.startswith(f"{root}/") for root in mounted)
    ]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        where = f"below {', '.join(mounted)}" if mounted else "on a volume (`deploy.kubernetes.volumes`)"
        raise ConfigError(
            f"{path}: pods cannot see {'; '.join(map(shown, lost[:_SHOWN]))}{more}: use URLs, or paths {where}"
        )
    return sent.text
