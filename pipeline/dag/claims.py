"""Leases on work, by the store's own clock.

A claim only saves double work: two runs that compute the same part both finish, and the first manifest wins. So a wrongly
taken-over claim costs time, never a result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from lodeset.pipeline import children
from lodeset.pipeline.dag.background import repeating
from lodeset.pipeline.dag.files import ABANDONED_S
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import HeldError, LodesetError

LEASE_SECONDS = 60.0
# In the environment of a job of a cluster: its name.
JOB = "LODESET_JOB"


def _store_time(store: Store, relative: str) -> float:
    modified = store.fs.modified(store.path(relative))
    if modified.tzinfo is None:
        modified = modified.replace(tzinfo=UTC)
    return float(modified.timestamp())


def store_clock(store: Store) -> float:
    """The time now by the clock that dates the store's files, in seconds since 1970."""
    probe = f"claims/.clock-{uuid.uuid4().hex}"
    store.put_absent(probe, b"")
    try:
        return _store_time(store, probe)
    except FileNotFoundError:
        return datetime.now(UTC).timestamp()
    finally:
        store.delete(probe)


def clock(store: Store) -> float:
    """`store_clock`, or the time of this machine where the store can only be read."""
    try:
        return store_clock(store)
    except (OSError, LodesetError):
        return datetime.now(UTC).timestamp()


def file_time(store: Store, relative: str, missing: float) -> float:
    """When a file was last written, by the store's clock; `missing` if there is none."""
    try:
        return _store_time(store, relative)
    except FileNotFoundError:
        return missing


def is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether the owner is known to have ended, so that its lease need not run out.

    Only a process that would be visible here can be known to be gone: one of the same boot of the same machine and of the same
    PID namespace. Two containers may share a host name and see the same numbers, and both may be alive.
    """
    if any(owner.get(key) != value for key, value in _here().items()):
        return False
    try:
        return children.started_at(int(owner["pid"])) != str(owner["started"])
    except (psutil.Error, KeyError, TypeError, ValueError):
        return True


@functools.cache
def _here() -> Mapping[str, str]:
    """Where process numbers mean the same as here: host, boot, PID namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else f"{psutil.boot_time():.0f}",
        "namespace": str(namespace.readlink()) if namespace.is_symlink() else "",
    }


def this_process() -> dict[str, Any]:
    """This process, and where its number means something: the owner of a claim; and the job of a cluster that it is in."""
    job = {"job": os.environ[JOB]} if os.environ.get(JOB) else {}
    return {**_here(), "pid": os.getpid(), "started": children.started_at(os.getpid()), **job}


def _owner(held: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(held))
    except (ValueError, TypeError):
        return {}


def _lasts(age: float) -> bool:
    """Whether a lease has not run out. One from the future was dated by a clock that has been set back since; its owner, if
    alive, would have renewed it."""
    return abs(age) < LEASE_SECONDS


@dataclass(frozen=True)
class Holder:
    """Who holds a claim; `age` is the number of seconds since it was last renewed, by the store's clock."""

    claim: str
    owner: Mapping[str, Any]
    age: float

    def __str__(self) -> str:
        job = f" (job {self.owner['job']})" if self.owner.get("job") else ""
        return f"process {self.owner.get('pid')} on {self.owner.get('host')}{job}, last seen {self.age:.0f} s ago"


def holders(store: Store) -> list[Holder]:
    """Who holds claims and may be alive. Changes nothing but for a probe of the store's clock."""
    names = [name.removesuffix(".json") for name in store.names("claims") if name.endswith(".json")]
    now, found = clock(store) if names else 0.0, []
    for name in names:
        path = f"claims/{name}.json"
        try:
            age = now - _store_time(store, path)
        except FileNotFoundError:
            continue
        owner = _owner(store.read(path) or b"")
        if _lasts(age) and not is_gone(owner):
            found.append(Holder(name, owner, age))
    return found


def live(store: Store) -> list[str]:
    """The names of the claims that somebody alive holds; claims of processes that ended here are cleared away."""
    for name in store.names("claims"):
        held = store.read(f"claims/{name}") if name.endswith(".json") else None
        if held is not None and is_gone(_owner(held)):
            _clear(store, f"claims/{name}", held)
    return [holder.claim for holder in holders(store)]


def _take(store: Store, path: str, mine: bytes, what: str) -> None:
    while not store.put_absent(path, mine):
        held = store.read(path)
        if held is None:
            continue
        owner = _owner(held)
        try:
            age = store_clock(store) - _store_time(store, path)
        except FileNotFoundError:
            continue
        if not is_gone(owner) and _lasts(age):
            raise HeldError(
                f"{what} is being made by another run ({Holder(path, owner, age)}): wait for it, or stop it; "
                f"an abandoned claim ends by itself after {LEASE_SECONDS:.0f} s"
            )
        _clear(store, path, held)


def _clear(store: Store, path: str, held: bytes) -> None:
    """Delete an abandoned claim, and no other: two processes that find it at the same time must not delete each other's.

    Whoever puts the marker may delete, and looks once more before that. A marker whose process died blocks for a while.
    """
    marker = f"{path}.{hashlib.sha256(held).hexdigest()[:16]}"
    if not store.put_absent(marker, b""):
        with contextlib.suppress(FileNotFoundError):
            if store_clock(store) - _store_time(store, marker) > ABANDONED_S:
                store.delete(marker)
        time.sleep(0.05)
        return
    try:
        if store.read(path) == held:
            store.delete(path)
    finally:
        store.delete(marker)


@contextlib.contextmanager
def claim(store: Store, name: str, what: str) -> Iterator[None]:
    """Holds a lease while the block runs, renewing it from a thread.

    Raises:
        HeldError: somebody alive holds it.
    """
    path = f"claims/{name}.json"
    mine = json.dumps({**this_process(), "token": uuid.uuid4().hex}).encode()
    _take(store, path, mine, what)

    def renew() -> float | None:
        # A store that does not answer now may answer next time: the lease lasts for three tries.
        with contextlib.suppress(OSError, LodesetError):
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
