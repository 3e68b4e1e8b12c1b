import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lodeset.pipeline import children
from lodeset.pipeline.dag import claims
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import HeldError, LodesetError


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


def gone_owner() -> dict[str, object]:
    """What a process of this machine that has ended left in its claim."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = children.started_at(process.pid)
    process.communicate(b"\n")
    return {**claims.this_process(), "pid": process.pid, "started": started}


def test_a_dead_owner_of_this_machine_is_taken_over_at_once(store: Store) -> None:
    store.put_absent("claims/embed.json", json.dumps(gone_owner()).encode())
    with claims.claim(store, "embed", "embed/pool"):
        pass


@pytest.mark.parametrize("key", ["host", "boot", "namespace"])
def test_an_owner_whose_process_numbers_mean_something_else_is_not_judged_by_its_number(store: Store, key: str) -> None:
    store.put_absent("claims/embed.json", json.dumps({**gone_owner(), key: "another"}).encode())
    with pytest.raises(HeldError), claims.claim(store, "embed", "embed/pool"):
        pass
    assert [holder.claim for holder in claims.holders(store)] == ["embed"]


HOLDS = """
import sys, time
from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.store import Store
with claim(Store(sys.argv[1]), "embed", "embed/pool"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_live_claim_of_another_pid_namespace_is_respected(store: Store) -> None:
    """As of two containers that share a host name: the numbers of one mean nothing in the other."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us make PID namespaces")
    inside = [*unshare, sys.executable, "-c", HOLDS, store.url]
    with subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(HeldError, match="being made by another run"), claims.claim(store, "embed", "embed/pool"):
            pass
        assert claims.live(store) == ["embed"]
        other.communicate()
    with claims.claim(store, "embed", "embed/pool"):
        pass


def test_of_many_who_take_over_a_dead_claim_one_holds_it(store: Store) -> None:
    store.put_absent("claims/embed.json", json.dumps(gone_owner()).encode())
    ready, done = threading.Barrier(8), threading.Barrier(8)

    def contend(_: int) -> bool:
        ready.wait()
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(claims.claim(store, "embed", "embed/pool"))
                return True
            except HeldError:
                return False
            finally:
                done.wait()  # nobody lets go before everybody has tried

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(contend, range(8))) == 1
    assert store.names("claims") == []


def test_a_claim_dated_by_a_clock_that_was_set_back_does_not_block_for_an_hour(store: Store) -> None:
    store.put_absent("claims/embed.json", json.dumps({"host": "elsewhere", "pid": 1, "started": "0"}).encode())
    path = Path(store.path("claims/embed.json"))
    os.utime(path, (path.stat().st_mtime + 3600,) * 2)
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


def test_a_store_that_does_not_answer_for_a_while_costs_no_claim(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.3)
    read, troubled = Store.read, [True]

    def sometimes(self: Store, relative: str) -> bytes | None:
        if troubled[0] and threading.current_thread() is not threading.main_thread():
            raise LodesetError("the store cannot be reached")
        return read(self, relative)

    monkeypatch.setattr(Store, "read", sometimes)
    with claims.claim(store, "embed", "embed/pool"):
        path = Path(store.path("claims/embed.json"))
        before = path.stat().st_mtime_ns
        time.sleep(0.25)
        troubled[0] = False
        time.sleep(0.25)
        assert path.stat().st_mtime_ns > before  # renewed again
