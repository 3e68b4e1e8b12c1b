"""Which versions a run was made with, for its record."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

# What results can depend on.
PACKAGES = (
    "lodeset",
    "torch",
    "ray",
    "apache-beam",
    "pyarrow",
    "numpy",
    "pillow",
    "onnxruntime",
    "faiss-cpu",
    "faiss-gpu",
)


def versions() -> dict[str, str]:
    """Python and the packages that are there, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
