"""Blocks of remote files in a folder of this machine, shared by all its processes and bounded.

Ingest, embed, dedup and write_shards read the same bytes of a source one after another; with the cache they are fetched
once. A block's name is the digest of the file's URL, state (entity tag or modification time) and size, and of its
number, so a file that changed is never taken for the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lodeset.pipeline.remote.cache import Cache, machine_cache

SIZE = 8 * 2**20


def state_of(info: dict[str, Any]) -> str:
    """What changes when a file does: its entity tag or the time of its last change; "" where a driver tells neither."""
    for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"):
        if info.get(key) is not None:
            return str(info[key])
    return ""


@dataclass(frozen=True)
class Blocks:
    """The blocks of one file; without a cache they are fetched each time."""

    cache: Cache | None
    file: str

    def block(self, number: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        if self.cache is None:
            return fetch()
        path = self.cache.path(hashlib.sha256(f"{self.file} {number}".encode()).hexdigest())
        with contextlib.suppress(OSError), open(path, "rb") as file:
            data = file.read()
            if len(data) == size:
                os.utime(path)  # was used last now
                return data
        data = fetch()
        self.cache.keep(path, data)
        return data


NONE = Blocks(None, "")


def of(url: str, info: dict[str, Any]) -> Blocks:
    """The blocks of a file with this URL and what a listing says about it."""
    state, cache = state_of(info), machine_cache()
    if cache is None or not state:
        return NONE
    return Blocks(cache, f"{url} {state} {info['size']}")
