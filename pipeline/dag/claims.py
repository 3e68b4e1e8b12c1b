"""Leases on work, by the store's own clock.

A claim only saves double work: two runs that compute the same part both finish, and the first manifest wins. So a wrongly
taken-over claim costs time, never a result.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psutil

from lodeset.pipeline.dag.background import repeating
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import HeldError

LEASE_SECONDS = 60.0


def _store_time(store: Store, relative: str) -> float:
    modified = store.fs.modified(store.path(relative))
    if modified.tzinfo is None:
        modified = modified.replace(tzinfo=UTC)
    return float(modified.timestamp())


def _now(store: Store) -> float:
    probe = f"claims/.clock-{uuid.uuid4().hex}"
    store.put_absent(probe, b"")
    try:
        return _store_time(store, probe)
    except FileNotFoundError:
        return datetime.now(UTC).timestamp()
    finally:
        store.delete(probe)


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner is a process of this machine that no longer runs (so its lease need not run out)."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        return bool(psutil.Process(owner["pid"]).create_time() != owner["started"])
    except (psutil.Error, KeyError, TypeError):
        return True


def _owner(held: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(held))
    except (ValueError, TypeError):
        return {}


def live(store: Store) -> list[str]:
    """The names of the claims that somebody alive holds; those of processes that ended here are cleared away."""
    names = [name.removesuffix(".json") for name in store.names("claims") if name.endswith(".json")]
    now, found = _now(store) if names else 0.0, []
    for name in names:
        path = f"claims/{name}.json"
        try:
            fresh = now - _store_time(store, path) < LEASE_SECONDS
        except FileNotFoundError:
            continue
        if _is_gone(_owner(store.read(path) or b"")):
            store.delete(path)
        elif fresh:
            found.append(name)
    return found


def _take(store: Store, path: str, mine: bytes, what: str) -> None:
    if store.put_absent(path, mine):
        return None
    held = store.read(path)
    if held is None:
        return _take(store, path, mine, what)
    owner = _owner(held)
    try:
        age = _now(store) - _store_time(store, path)
    except FileNotFoundError:
        return _take(store, path, mine, what)
    if not _is_gone(owner) and age < LEASE_SECONDS:
        raise HeldError(
            f"{what} is being made by another run (process {owner.get('pid')} on {owner.get('host')}, last seen {age:.0f} s ago): "
            f"wait for it, or stop it; an abandoned claim ends by itself after {LEASE_SECONDS:.0f} s"
        )
    store.delete(path)
    return _take(store, path, mine, what)


@contextlib.contextmanager
def claim(store: Store, name: str, what: str) -> Iterator[None]:
    """Holds a lease while the block runs, renewing it from a thread.

    Raises:
        HeldError: somebody alive holds it.
    """
    path = f"claims/{name}.json"
    me = psutil.Process()
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": me.create_time(), "token": uuid.uuid4().hex}
    mine = json.dumps(owner).encode()
    _take(store, path, mine, what)

    def renew() -> float | None:
        with contextlib.suppress(OSError):
            if store.read(path) != mine:
                return None
            store.fs.pipe_file(store.path(path), mine)
        return LEASE_SECONDS / 3

    try:
        with repeating(renew, LEASE_SECONDS / 3):
            yield
    finally:
        if store.read(path) == mine:
            store.delete(path)
