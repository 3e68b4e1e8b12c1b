"""The versions that a run was made with, for its record."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

# Packages that results can depend on.
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
    """Versions of Python and of the installed packages, by name."""
    versions_found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions_found[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions_found
