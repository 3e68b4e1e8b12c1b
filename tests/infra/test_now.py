"""What the store alone says of a run: at work, silent, killed, failed, stopped, done."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import toy_stages
from inline import InThisProcess, no_ray

from lodeset.infra.looking.now import now
from lodeset.pipeline.dag import attempts
from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.runner import Event, Runner
from lodeset.pipeline.dag.runs import Wanted, record
from lodeset.pipeline.dag.stage import Context, Input, Outcome, Progress, Stage
from lodeset.pipeline.dag.store import Rows, Store
from lodeset.pipeline.errors import GateError, LodesetError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "store"))
    made.prepare()
    return made


def stage(name: str, function: Callable[[Context], Outcome] = toy_stages.count, **inputs: Stage) -> Stage:
    return Stage(name, "pool", 1, "beam", function, {"k": 1}, {k: Input(s) for k, s in inputs.items()}, max_cpus=1)


def run(store: Store, *stages: Stage, watch: Callable[[Event], None] = lambda event: None) -> None:
    """As `infra.session.run_in` does it."""
    graph = {s.id: s for s in stages}
    with (
        claim(store, attempts.claim_name("zoo", None), "zoo"),
        attempts.attempt(store, graph, watch, name="zoo") as told,
    ):
        Runner(store, 1, no_ray, told, launch=InThisProcess).run(graph)


def test_a_store_that_never_saw_a_run(store: Store) -> None:
    found = now(store, "zoo", None)
    assert (found.state, found.moving, found.safe_to_run) == ("never run", False, True)
    assert found.next_command("zoo.yaml", None) == "lodeset plan zoo.yaml"
    assert found.status_code(None) == 1


def test_done_and_of_another_data_set(store: Store) -> None:
    run(store, stage("a"))
    found = now(store, "zoo", None)
    assert (found.state, found.exit_code, [s.state for s in found.stages]) == ("done", 0, ["finished"])
    assert [found.status_code(changed) for changed in (False, True, None)] == [0, 1, 1]
    assert found.next_command("zoo.yaml", True) == "lodeset run zoo.yaml"
    assert now(store, "other", None).state == "never run"
    assert now(store, "zoo", 100).state == "never run"


def test_at_work_with_what_each_stage_does_and_waits_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "LOCAL_S", 0.02)
    a = stage("a", holds)
    b, c = stage("b", x=a), stage("c")
    seen = []

    def look(event: Event) -> None:
        if event.kind == "progress" and event.progress == HALF:
            time.sleep(0.3)  # until the next news
            seen.append(now(store, "zoo", None))

    run(store, a, b, c, watch=look)
    (found,) = seen
    assert (found.state, found.moving, found.safe_to_run) == ("running", True, False)
    assert found.status_code(None) == 4
    assert found.owner["pid"] == os.getpid()
    by_id = {s.id: s for s in found.stages}
    at = by_id["a/pool"]
    assert (at.state, at.fraction, at.parts_done, at.parts, at.phase) == ("running", 0.5, 2, 4, "sort")
    assert at.last_part_age is not None
    assert at.last_part_age < 30
    assert (by_id["b/pool"].state, by_id["b/pool"].waits_for) == ("waiting", "after a/pool")
    assert by_id["c/pool"].waits_for.startswith("cores: it takes 1, and of 1 0 are free (a/pool 1)")


HALF = Progress(0.5, 100, "images", "sort", 2, 4)


def holds(context: Context) -> Outcome:
    context.report(Progress(0.25, 50, "images", "sort", 1, 4))
    context.report(HALF)
    time.sleep(0.05)  # the runner reads this before the outcome
    return Outcome({}, Rows(0, 0))


def test_a_failed_stage_is_named_with_its_error_and_its_log(store: Store) -> None:
    with pytest.raises(LodesetError):
        run(store, stage("a", toy_stages.user_error), stage("b"))
    found = now(store, "zoo", None)
    assert (found.state, found.exit_code, found.safe_to_run) == ("failed", 1, True)
    assert "add water" in found.why
    failed = next(s for s in found.stages if s.id == "a/pool")
    assert (failed.state, "add water" in failed.error) == ("failed", True)
    assert Path(failed.log).parent == Path(store.path("logs"))
    assert found.next_command("zoo.yaml", None) == "lodeset run zoo.yaml"


def test_a_gate_keeps_its_exit_code(store: Store) -> None:
    with pytest.raises(GateError):
        run(store, stage("a", toy_stages.gate))
    found = now(store, "zoo", None)
    assert (found.status_code(None), found.next_command("zoo.yaml", None)) == (3, "lodeset report zoo.yaml")


def test_secrets_in_an_error_stay_out_of_the_store(store: Store) -> None:
    with pytest.raises(LodesetError), attempts.attempt(store, {}, lambda event: None, name="zoo"):
        raise LodesetError("https://user:hunter2@host/a.tar is not there")
    assert b"hunter2" not in (store.read(attempts.path_of(1)) or b"")
    assert "host/a.tar is not there" in now(store, "zoo", None).why


STOPS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from lodeset.pipeline.dag import attempts
from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.store import Store
store = Store(sys.argv[1])
with claim(store, "run-zoo", "zoo"), attempts.attempt(store, {}, print, name="zoo"):
    print("at work", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("number", "state", "word"),
    [(signal.SIGKILL, "killed", "ended without a word"), (signal.SIGINT, "stopped", "stopped")],
)
def test_a_run_that_was_killed_or_stopped(store: Store, number: signal.Signals, state: str, word: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPS, store.url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        assert now(store, "zoo", None).state == "running"
        process.send_signal(number)
        process.wait(timeout=60)
    found = now(store, "zoo", None)
    assert (found.state, found.safe_to_run, word in found.why) == (state, True, True)
    assert found.next_command("zoo.yaml", None) == "lodeset run zoo.yaml"


def elsewhere(store: Store, age: float) -> None:
    """The news of a run on another machine, last written so many seconds ago."""
    here = attempts.read(store, 1)
    assert here is not None
    there = dataclasses.replace(here, owner={**here.owner, "host": "elsewhere"}, state="running", exit_code=None)
    store.overwrite(attempts.path_of(1), attempts.sealed(dataclasses.asdict(there)))
    path = Path(store.path(attempts.path_of(1)))
    os.utime(path, (path.stat().st_mtime - age,) * 2)


def test_silence_is_not_taken_for_failure(store: Store) -> None:
    with attempts.attempt(store, {}, lambda event: None, name="zoo"):
        pass
    elsewhere(store, age=3)
    assert now(store, "zoo", None).state == "running"
    elsewhere(store, age=400)
    found = now(store, "zoo", None)
    assert (found.state, found.moving, found.safe_to_run, found.status_code(None)) == ("silent", None, True, 1)
    with claim(store, "run-zoo", "zoo"):  # by another run, which has no news yet
        found = now(store, "zoo", None)
        assert (found.state, found.safe_to_run, found.status_code(None), found.attempt) == ("silent", False, 4, None)
    # Its own claim is renewed, though nothing is heard of it.
    there = attempts.read(store, 1)
    assert there is not None
    store.put_absent("claims/run-zoo.json", json.dumps(dict(there.owner)).encode())
    found = now(store, "zoo", None)
    assert (found.state, found.safe_to_run, found.attempt) == ("silent", False, 1)
    assert found.next_command("zoo.yaml", None) == "lodeset status zoo.yaml --watch"


def test_damaged_news_stops_nothing(store: Store) -> None:
    run(store, stage("a"))
    Path(store.path(attempts.path_of(1))).write_bytes(b'{"state": "done"')
    assert now(store, "zoo", None).state == "never run"
    run(store, stage("a"))
    assert now(store, "zoo", None).attempt == 2


def test_a_finished_data_set_whose_news_was_deleted_is_done(store: Store) -> None:
    """As by a take-down, and in stores that a lodeset without news has made."""
    made = stage("a")
    run(store, made)
    artifact = store.history("a", "pool")[0]
    record(store, Wanted("zoo", None, "", {}, (made.id,)), {made.id: artifact}, {}, 1.0, 2.0)
    for number in attempts.numbers(store):
        store.delete(attempts.path_of(number))
    assert now(store, "zoo", None).state == "done"
    assert now(store, "another", None).state == "never run"


def test_parts_that_were_found_finished_are_not_news(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with attempts.attempt(store, {}, lambda event: None, name="zoo") as told:
        a = stage("a")
        told(Event("started", a))
        told(Event("progress", a, Progress(0.9, 0, "images", "", 900, 1000)))
        told(Event("waiting", stage("b")))  # which has it written
        assert [s.last_part_age for s in now(store, "zoo", None).stages if s.id == "a/pool"] == [None]
        told(Event("progress", a, Progress(0.901, 1, "images", "", 901, 1000)))
        told(Event("waiting", stage("b")))
        assert [s.last_part_age is not None for s in now(store, "zoo", None).stages if s.id == "a/pool"] == [True]


def test_old_news_is_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "KEPT", 3)
    with attempts.attempt(store, {}, lambda event: None, name="another data set"):
        pass
    for _ in range(6):
        run(store, stage("a"))
    # Those of another data set do not count: it may run once a month.
    assert attempts.numbers(store) == [1, 4, 5, 6, 7]


def test_every_attempt_gets_a_number_of_its_own(store: Store) -> None:
    begun = threading.Barrier(6)

    def attempt(_: int) -> None:
        begun.wait()
        with attempts.attempt(store, {}, lambda event: None, name="zoo"):
            pass

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert attempts.numbers(store) == [1, 2, 3, 4, 5, 6]
