import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import toy_stages
from inline import InThisProcess, no_ray

from lodeset.pipeline.dag.cluster import Cluster, Joined
from lodeset.pipeline.dag.decisions import decide
from lodeset.pipeline.dag.launched import ChildProcess, Launched
from lodeset.pipeline.dag.runner import RESTARTS, Event, Runner
from lodeset.pipeline.dag.stage import PREVIOUS, Context, Follows, Input, Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.engines.room import lacks, share_of
from lodeset.pipeline.errors import GateError, HeldError, LodesetError, LostError


def stage(name: str, function: Callable[[Context], Outcome] = toy_stages.count, **changes: object) -> Stage:
    return replace(Stage(name, "pool", 1, "beam", function, {"k": 1}, max_cpus=1), **changes)


def dag(*stages: Stage) -> dict[str, Stage]:
    return {s.id: s for s in stages}


class Watched:
    """What is decided does not depend on where stages run: in this process, unless their processes are what is tested."""

    def __init__(
        self,
        store: Store,
        cpus: int = 2,
        fresh: tuple[str, ...] = (),
        launch: Callable[[bytes, Path], Launched] | None = InThisProcess,
    ) -> None:
        self.events: list[Event] = []
        self.runner = Runner(store, cpus, no_ray, self.events.append, fresh, launch)

    def run(self, *stages: Stage) -> dict[str, Artifact]:
        return self.runner.run(dag(*stages))

    def kinds(self) -> list[tuple[str, str]]:
        return [(e.kind, e.stage.name) for e in self.events if e.kind not in ("progress", "waiting")]


FINISHED = Artifact("source", "pool", 1, "f", {}, {}, {}, Rows(1, 1), {}, {}, 0.0, 0.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize("launch", [None, ChildProcess])
def test_runs_in_order_then_does_nothing(store: Store, launch: Callable[[bytes, Path], Launched] | None) -> None:
    a = stage("a")
    b = stage("b", inputs={"x": Input(a)})
    first = Watched(store, launch=launch)
    artifacts = first.run(a, b)
    assert artifacts["b/pool"].rows.kept == 2
    assert first.kinds() == [("started", "a"), ("done", "a"), ("started", "b"), ("done", "b")]
    assert any(e.kind == "progress" and e.progress and e.progress.fraction == 0.5 for e in first.events)
    second = Watched(store)
    assert second.run(a, b) == artifacts
    assert second.kinds() == [("finished", "a"), ("finished", "b")]


def test_a_stage_waits_for_the_one_that_makes_its_parts(store: Store) -> None:
    """Both are ready at once and there are cores for both; what the guest alone needs comes before the host."""
    source, fit = stage("source"), stage("fit")
    guest = stage("guest", inputs={"x": Input(source), "fitted": Input(fit)})
    host = stage("host", toy_stages.host, inputs={"x": Input(source)}, also=(guest.id,))
    assert host.fingerprint({"source/pool": FINISHED}) == replace(host, also=()).fingerprint({"source/pool": FINISHED})
    watched = Watched(store, cpus=4)
    made = watched.run(source, host, fit, guest)
    order = watched.kinds()
    assert order.index(("done", "fit")) < order.index(("started", "host"))
    assert order.index(("done", "host")) < order.index(("started", "guest"))
    assert made["host/pool"].details["guests"] == {guest.id: [made[guest.id].fingerprint, ["fitted", "x"], False]}

    # A guest that is finished, or not wanted, is none; a finished host holds nobody up.
    changed = replace(host, spec={"k": 2})
    assert Watched(store).run(source, changed, fit, guest)["host/pool"].details["guests"] == {}
    assert Watched(store).run(source, replace(host, spec={"k": 3}))["host/pool"].details["guests"] == {}
    again = replace(guest, spec={"k": 2})
    third = Watched(store)
    third.run(source, changed, fit, again)
    assert ("started", "guest") in third.kinds() and ("started", "host") not in third.kinds()


def test_plan_says_why(store: Store) -> None:
    a = stage("a")
    b = stage("b", inputs={"x": Input(a)})
    planned = decide(store, dag(a, b))
    assert [(d.action, d.reason) for d in planned.values()] == [("run", "not made yet"), ("wait", "after a/pool")]
    Watched(store).run(a, b)
    assert {d.action for d in decide(store, dag(a, b)).values()} == {"finished"}
    changed = replace(a, spec={"k": 2})
    planned = decide(store, dag(changed, replace(b, inputs={"x": Input(changed)})))
    assert planned["a/pool"].reason == "k 1 -> 2"
    assert planned["b/pool"].action == "wait"
    assert decide(store, dag(replace(a, version=2)))["a/pool"].reason == "version 1 -> 2"
    advised = replace(changed, advice={"k": "start anew", "other": "never told"})
    assert decide(store, dag(advised))["a/pool"].reason == "k 1 -> 2; start anew"


def test_content_cuts_off_what_lies_downstream(store: Store) -> None:
    """An input that was made again with the same content does not make what depends on that content run again."""
    a = stage("a")
    Watched(store).run(a, stage("b", inputs={"x": Input(a, "images")}))
    moved = replace(a, spec={"k": 2})
    again = Watched(store)
    again.run(moved, stage("b", inputs={"x": Input(moved, "images")}))
    assert again.kinds() == [("started", "a"), ("done", "a"), ("finished", "b")]


def test_a_digest_that_changed_is_not_spelled_out(store: Store) -> None:
    Watched(store).run(stage("a", spec={"listing": "0" * 64, "files": 1}))
    decision = decide(store, dag(stage("a", spec={"listing": "f" * 64, "files": 2})))["a/pool"]
    assert decision.reason == "files 1 -> 2; listing changed"


def test_what_was_fitted_is_taken_over_unless_fresh(store: Store) -> None:
    a = stage("a")
    fitted = stage("fit", inputs={"x": Input(a)}, frozen=True)
    first = Watched(store).run(a, fitted)["fit/pool"]
    grown = replace(a, spec={"k": 2})
    fitted_on_grown = stage("fit", inputs={"x": Input(grown)}, frozen=True)
    taken = Watched(store)
    assert taken.run(grown, fitted_on_grown)["fit/pool"] == first
    assert ("taken over", "fit") in taken.kinds()
    assert Watched(store, fresh=("fit",)).run(grown, fitted_on_grown)["fit/pool"].fingerprint != first.fingerprint


def test_a_stage_goes_on_from_its_last_artifact_which_is_an_input(store: Store) -> None:
    def at(k: int, limit: int = 0, version: int = 1) -> tuple[Stage, Stage]:
        source = stage("source", spec={"k": k})
        config = {"k": 1, "limit": limit}
        inputs = {"x": Input(source)}
        return source, stage(
            "go", toy_stages.goes_on, spec=config, inputs=inputs, follows=Follows(("limit",)), version=version
        )

    def ran(*stages: Stage, fresh: tuple[str, ...] = ()) -> tuple[Artifact, str]:
        watched = Watched(store, fresh=fresh)
        made = watched.run(*stages)["go/pool"]
        return made, next(kind for kind, name in watched.kinds() if name == "go")

    first, _ = ran(*at(1))
    assert first.details["from"] is None and PREVIOUS not in first.inputs
    assert ran(*at(1)) == (first, "finished")
    second, _ = ran(*at(2))
    assert second.details["from"] == second.inputs[PREVIOUS]["fingerprint"] == first.fingerprint
    # What was made from these inputs is finished, whatever came after it and whatever it went on from.
    assert ran(*at(2)) == (second, "finished") and ran(*at(1)) == (first, "finished")
    Watched(store).run(at(3)[0])
    assert "goes on from" in decide(store, dag(*at(3)))["go/pool"].reason
    # Nor from another trial, nor from what an older version made.
    assert ran(*at(3, limit=5))[0].details["from"] is None
    assert ran(*at(3, version=2))[0].details["from"] is None
    third, _ = ran(*at(3))
    assert third.details["from"] == second.fingerprint

    anew, kind = ran(*at(3), fresh=("go",))
    assert kind == "started" and anew.details["from"] is None and anew.fingerprint != third.fingerprint
    assert ran(*at(3)) == (anew, "finished") == ran(*at(3), fresh=("go",))


def test_what_was_tried_out_since_the_last_publication_does_not_count(store: Store) -> None:
    def at(k: int) -> tuple[Stage, Stage]:
        go = stage("go", toy_stages.goes_on, spec={"k": k}, follows=Follows((), published=("publish/pool", "made")))
        return go, stage("publish", inputs={"made": Input(go)})

    tried = Watched(store).run(at(1)[0])["go/pool"]
    first = Watched(store).run(*at(2))["go/pool"]
    assert first.details["from"] == tried.fingerprint  # nothing was published yet
    assert Watched(store).run(at(3)[0])["go/pool"].details["from"] == first.fingerprint
    assert Watched(store).run(at(4)[0])["go/pool"].details["from"] == first.fingerprint
    second = Watched(store).run(*at(5))["go/pool"]
    assert second.details["from"] == first.fingerprint
    assert Watched(store).run(at(6)[0])["go/pool"].details["from"] == second.fingerprint


def test_what_was_fitted_on_something_fitted_follows_it(store: Store) -> None:
    a = stage("a")
    dictionary = stage("dictionary", inputs={"x": Input(a)}, frozen=True)
    Watched(store).run(a, dictionary, stage("thresholds", inputs={"x": Input(a), "f": Input(dictionary)}, frozen=True))
    grown = replace(a, spec={"k": 2})
    other = stage("dictionary", inputs={"x": Input(grown)}, frozen=True, spec={"k": 3})
    again = Watched(store)
    again.run(grown, other, stage("thresholds", inputs={"x": Input(grown), "f": Input(other)}, frozen=True))
    assert ("done", "thresholds") in again.kinds()


def test_independent_stages_share_the_budget(store: Store) -> None:
    a, b = stage("a", toy_stages.sleepy), stage("b", toy_stages.sleepy)
    done = Watched(store, cpus=2, launch=None).run(a, b)
    times = [(a.details["started"], a.details["ended"]) for a in done.values()]
    assert max(s for s, _ in times) < min(e for _, e in times)


def test_a_wide_stage_gets_all_cores(store: Store) -> None:
    narrow, wide = stage("a"), stage("b", max_cpus=99)
    assert Watched(store, cpus=3).run(narrow, wide)["b/pool"].details["cpus"] == 3


@pytest.mark.parametrize(
    ("function", "kind", "told", "launch"),
    [
        (toy_stages.user_error, LodesetError, "a/pool: the pool is dry: add water", InThisProcess),
        (toy_stages.gate, GateError, "too large", InThisProcess),
        (toy_stages.gate, GateError, "too large", ChildProcess),
        (toy_stages.gate, GateError, "too large", None),
        (toy_stages.defect, LodesetError, "ZeroDivisionError: oops", InThisProcess),
        (toy_stages.engine_defect, LodesetError, "RuntimeError: KeyError: 'vector' (log:", InThisProcess),
        (toy_stages.dies, LodesetError, "was killed by signal 9", ChildProcess),
        (toy_stages.dies, LodesetError, "was killed by signal 9", None),
        (toy_stages.loses_rows, LodesetError, "10 in, 7 kept, dropped {'near': 2}", InThisProcess),
    ],
)
def test_a_failure_publishes_nothing_and_can_be_run_again(
    store: Store,
    function: Callable[[Context], Outcome],
    kind: type[LodesetError],
    told: str,
    launch: Callable[[bytes, Path], Launched] | None,
) -> None:
    a = stage("a", function)
    with pytest.raises(kind) as caught:
        Watched(store, launch=launch).run(a, stage("b", inputs={"x": Input(a)}))
    assert told in str(caught.value) and "Traceback" not in str(caught.value)
    assert store.history("a", "pool") == []
    assert store.names("claims") == []
    assert Watched(store).run(stage("a"))["a/pool"].rows.kept == 1


def test_a_failure_lets_its_neighbours_finish(store: Store) -> None:
    with pytest.raises(LodesetError):
        Watched(store, launch=None).run(stage("a", toy_stages.defect), stage("b", toy_stages.sleepy))
    assert len(store.history("b", "pool")) == 1


@pytest.mark.parametrize("launch", [None, ChildProcess])
def test_nothing_survives_a_stage(store: Store, launch: Callable[[bytes, Path], Launched] | None) -> None:
    left = Watched(store, launch=launch).run(stage("a", toy_stages.leaves_a_process))["a/pool"].details["pid"]
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


def test_stages_are_started_whatever_becomes_of_the_process_that_forks_them(store: Store) -> None:
    """It is ended by the first stage, whose result counts all the same; the next one gets a process of its own."""
    a = stage("a", toy_stages.ends_its_parent)
    made = Watched(store, launch=None).run(a, stage("b", inputs={"x": Input(a)}))
    assert made["a/pool"].details["forked"] and made["b/pool"].rows.kept == 1


def test_a_stage_sees_the_environment_of_its_start(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process as it is then, in Python and for what it starts."""
    a = stage("a", toy_stages.tells_its_environment)

    def look(event: Event) -> None:
        if event.kind == "done":
            monkeypatch.setenv("LODESET_TOLD", "later")

    monkeypatch.setenv("LODESET_TOLD", "first")
    made = Runner(store, 1, no_ray, look).run(
        dag(a, stage("b", toy_stages.tells_its_environment, inputs={"x": Input(a)}))
    )
    assert [made[f"{name}/pool"].details["told"] for name in ("a", "b")] == [["first"] * 2, ["later"] * 2]


def test_a_cluster_is_started_for_the_stage_that_asks(store: Store) -> None:
    started = []

    @contextlib.contextmanager
    def ray() -> Iterator[Joined]:
        started.append(1)
        yield Joined("10.0.0.1:1", 2, {"LODESET_TOLD": "joined"})

    stages = dag(stage("a", engine="ray"), stage("b", toy_stages.asks_for_ray, engine="ray"))
    told = Runner(store, 1, ray, lambda event: None).run(stages)["b/pool"].details
    assert (told["address"], told["told"], started) == ("10.0.0.1:1", "joined", [1])


def test_a_cluster_that_does_not_start_fails_the_stage_that_asks(store: Store) -> None:
    @contextlib.contextmanager
    def ray() -> Iterator[Joined]:
        raise LodesetError("no room for Ray")
        yield Joined("", 0)

    with pytest.raises(LodesetError, match="b/pool: no room for Ray"):
        Runner(store, 1, ray, lambda event: None).run(dag(stage("b", toy_stages.asks_for_ray, engine="ray")))


def test_two_runs_of_one_stage(store: Store) -> None:
    from lodeset.pipeline.dag.claims import claim

    a = stage("a")
    store.prepare()
    fingerprint = a.fingerprint({}) or ""
    with claim(store, f"a-pool-{fingerprint[:16]}", "a/pool"), pytest.raises(HeldError):
        Watched(store).run(a)


def test_a_damaged_store_is_told(store: Store) -> None:
    Watched(store).run(stage("a"))
    manifest = next(Path(store.root).glob("artifacts/a/pool/*/manifest.json"))
    manifest.write_text("{")
    with pytest.raises(LodesetError, match="damaged"):
        decide(store, dag(stage("a")))


# -- Ray clusters, without Ray


def test_what_no_node_can_give_is_told_from_what_is_busy() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]
    assert lacks(nodes, []) == ("", True)
    why, possible = lacks(nodes, [[{"CPU": 8.0}]])
    assert not possible
    assert why.startswith("8 CPU, which no node of the Ray cluster can give (nodes: 4 CPU; 2 CPU, 1 GPU)")
    # Two workers with a GPU each must start together, and there is one.
    assert lacks(nodes, [[{"GPU": 1.0}, {"GPU": 1.0}]])[1] is False
    assert lacks(nodes, [[{"GPU": 1.0}], [{"GPU": 1.0}]]) == ("2 GPU for 2 workers: the Ray cluster is busy", True)
    assert lacks([{"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0}], [[{"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}]])[1] is True
    # A group that fits only if large workers are placed first.
    assert lacks(nodes, [[{"CPU": 2.0}, {"CPU": 4.0}]])[1] is True


@pytest.mark.parametrize(
    ("nodes", "actors", "cores", "each"),
    [([8], 4, 2, 2), ([8], 8, 2, 1), ([1, 1, 1], 3, 2, 1), ([4, 1], 2, 4, 2), ([4, 4], 2, 4, 4), ([1, 1], 3, 1, 0.6)],
)
def test_actors_that_work_together_ask_for_what_nodes_have(
    nodes: list[int], actors: int, cores: int, each: float
) -> None:
    assert share_of(nodes, actors, cores) == each


class Lost(Exception):
    """Stands for Ray's own."""


Lost.__name__ = "ActorDiedError"


def loses_a_worker_once(context: Context) -> Outcome:
    marker = Path(context.store.path("lost"))
    if not marker.exists():
        marker.touch()
        raise RuntimeError("in a wrapper of Ray") from Lost("a node is gone")
    return toy_stages.count(context)


def always_loses_a_worker(context: Context) -> Outcome:
    raise Lost("a node is gone")


def test_a_stage_that_loses_a_worker_starts_again(store: Store) -> None:
    watched = Watched(store)
    made = watched.run(stage("a", loses_a_worker_once))
    assert made["a/pool"].rows.kept == 1
    assert watched.kinds() == [("started", "a"), ("again", "a"), ("started", "a"), ("done", "a")]


def test_a_stage_that_loses_workers_again_and_again_fails(store: Store) -> None:
    watched = Watched(store)
    with pytest.raises(LostError, match="ActorDiedError: a node is gone"):
        watched.run(stage("a", always_loses_a_worker))
    assert watched.kinds() == [("started", "a"), ("again", "a")] * RESTARTS + [("started", "a"), ("failed", "a")]


def test_a_cluster_has_a_budget_of_its_own(store: Store) -> None:
    """A stage of Ray on a cluster of 64 cores gets them all, and runs beside one that takes both cores of this machine."""
    joined = contextlib.nullcontext(Joined("head:6379", 64))
    events: list[Event] = []
    runner = Runner(store, 2, lambda: joined, events.append, launch=InThisProcess, cluster=Cluster("head:6379"))
    here = stage("here", max_cpus=2)
    there = stage("there", engine="ray", max_cpus=1_000)
    made = runner.run(dag(here, there))
    assert made["here/pool"].details["cpus"] == 2
    assert made["there/pool"].details["cpus"] == 64
    assert not [event for event in events if event.kind == "waiting" and "cores" in event.reason]
