"""Functions and classes by name, which are imported when they are needed. Loads nothing itself."""

from __future__ import annotations

import importlib
from typing import Any


def resolved(reference: str) -> Any:
    """What "package.module:name" names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
