"""The small networks that ship with the package: their files and digests. Loads neither torch nor their numbers."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

EVIDENCE = Path(__file__).with_name("copies.npz")  # of `evidence`
CLOSEUP = Path(__file__).with_name("closeup.npz")  # of `closeup`
DETAILS = Path(__file__).with_name("details.npz")  # of `details`


@functools.lru_cache(maxsize=4)
def identity(path: Path) -> str:
    """SHA-256 of the file, for keys and fingerprints."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
