"""The versions that a run was made with, for its record."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lodeset

# Beside the package in a checkout, and in what a job is sent.
LOCK = "requirements.lock"

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
    """Versions of Python and of the installed packages, by name, and the digest of the lock file, if there is one."""
    versions_found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions_found[name] = version(name)
        except PackageNotFoundError:
            continue
    lock = Path(lodeset.__path__[0]).parent / LOCK
    if lock.is_file():
        versions_found[LOCK] = f"sha256:{hashlib.sha256(lock.read_bytes()).hexdigest()}"
    return versions_found
