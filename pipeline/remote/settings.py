"""How patient this process and those that it starts are with remote file systems, and where they keep copies."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lodeset.pipeline.remote.cache import FOLDER, SIZE_GB
from lodeset.pipeline.remote.retries import ANSWERED, PATIENCE, REPEATS, SILENCE

if TYPE_CHECKING:
    from lodeset.pipeline.config import Resources

_KEYS = {"patience_s": PATIENCE, "silence_s": SILENCE, "cache_gb": SIZE_GB, "cache_dir": FOLDER}


def configure(resources: Resources) -> None:
    """Takes over what a configuration says; where it says nothing, the environment holds, then the defaults."""
    for key, variable in _KEYS.items():
        if key in resources.model_fields_set and getattr(resources, key) is not None:
            os.environ[variable] = str(getattr(resources, key))


def environment() -> dict[str, str]:
    """What processes that this one starts on any machine need to know."""
    names = (*_KEYS.values(), REPEATS, ANSWERED)
    return {name: os.environ[name] for name in names if name in os.environ}
