import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lodeset.pipeline.dag import claims
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import HeldError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path))
    made.prepare()
    return made


def test_held_while_held_and_free_afterwards(store: Store) -> None:
    held = pytest.raises(HeldError, match=f"process {os.getpid()}")
    with claims.claim(store, "embed", "a"), held, claims.claim(store, "embed", "a"):
        pass
    with claims.claim(store, "embed", "embed/pool"):
        pass
    assert store.names("claims") == []


def test_a_dead_owner_of_this_machine_is_taken_over_at_once(store: Store) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(gone.pid).create_time()
    gone.wait()
    owner = {"host": claims.socket.gethostname(), "pid": gone.pid, "started": started}
    store.put_absent("claims/embed.json", json.dumps(owner).encode())
    with claims.claim(store, "embed", "embed/pool"):
        pass


def test_an_owner_elsewhere_is_taken_over_when_its_lease_ran_out(store: Store) -> None:
    store.put_absent("claims/embed.json", json.dumps({"host": "elsewhere", "pid": 1, "started": 0}).encode())
    with pytest.raises(HeldError, match="on elsewhere"), claims.claim(store, "embed", "embed/pool"):
        pass
    path = Path(store.path("claims/embed.json"))
    old = path.stat().st_mtime - claims.LEASE_SECONDS - 1
    os.utime(path, (old, old))
    with claims.claim(store, "embed", "embed/pool"):
        pass


def test_a_torn_claim_does_not_block(store: Store) -> None:
    store.put_absent("claims/embed.json", b"{half")
    path = Path(store.path("claims/embed.json"))
    os.utime(path, (0, 0))
    with claims.claim(store, "embed", "embed/pool"):
        pass
