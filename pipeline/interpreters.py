"""How lodeset starts Python processes of its own: by module, with the same packages, wherever the user's working directory is.

A working directory may hold `lodeset.py`, `training/` or `pipeline/` of the user's. Python puts it first on the import path of
`python -m` and of `python -c`, and Ray adds it to that of its workers. So every process gets a safe path (`PYTHONSAFEPATH`) on
which the folder that this lodeset was imported from stands first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lodeset


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of lodeset."""
    return [sys.executable, "-m", f"lodeset.{module}", *arguments]


def import_path() -> dict[str, str]:
    """The environment variables with which a Python process imports what this one does, and this lodeset before any other."""
    root = str(Path(lodeset.__path__[0]).parent)
    others = [path for path in sys.path if path and path != root]
    return {"PYTHONPATH": os.pathsep.join([root, *others]), "PYTHONSAFEPATH": "1"}
