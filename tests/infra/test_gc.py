"""What a deletion takes and leaves, on a store of toy stages whose data sets grow."""

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import toy_stages
from inline import InThisProcess, no_ray

from lodeset.infra.upkeep.gc import GOING, Collected, collect
from lodeset.pipeline.dag import attempts, lists
from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.damage import contents, missing
from lodeset.pipeline.dag.decisions import decide
from lodeset.pipeline.dag.runner import Runner
from lodeset.pipeline.dag.runs import Wanted, record
from lodeset.pipeline.dag.stage import Input, Stage
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "store"))
    made.prepare()
    return made


def graph(size: int) -> dict[str, Stage]:
    """A pool of so many files, one part each, and a stage that compares them, which keeps parts of its own."""
    read = Stage("read", "pool", 1, "beam", toy_stages.reads, {"size": size}, max_cpus=1)
    compared = Stage("compare", "pool", 1, "beam", toy_stages.compares, {}, {"pool": Input(read)}, max_cpus=1)
    return {s.id: s for s in (read, compared)}


def run(store: Store, size: int, name: str = "zoo", shards: str = "") -> Mapping[str, Stage]:
    """A run that is on record; `shards` is the id under which it says that it wrote some."""
    stages = graph(size)
    with (
        claim(store, attempts.claim_name(name, None), name),
        attempts.attempt(store, stages, lambda event: None, name=name) as told,
    ):
        made = Runner(store, 1, no_ray, told, launch=InThisProcess).run(stages)
    if shards:
        made = {**made, shards: made["compare/pool"]}
    wanted = Wanted(name, None, "", {"size": size}, tuple(made))
    record(store, wanted, made, {}, float(size), float(size))
    return stages


def on_disk(store: Store) -> dict[str, int]:
    root = Path(store.root)
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}


def assert_whole(store: Store) -> None:
    held = contents(store)
    assert held.damage == ()
    assert missing(store, held.files()) == []


def test_every_byte_is_accounted_for(store: Store) -> None:
    for size in (3, 4, 5):
        run(store, size)
    Path(store.path("notes.txt")).write_text("mine")
    before = on_disk(store)
    found = collect(store, graph(5), keep=1, older_than=0, dry_run=True)
    assert sum(files for files, _ in found.sums.values()) == len(before)
    assert sum(size for _, size in found.sums.values()) == sum(before.values())
    assert found.sums["foreign"] == (1, 4)
    assert on_disk(store) == before
    done = collect(store, graph(5), keep=1, older_than=0)
    assert done.entries == found.entries
    after = on_disk(store)
    gone = {path: size for path, size in before.items() if path not in after}
    assert gone == {entry.path: entry.size_bytes for entry in done.entries}
    assert all(entry.kind in GOING for entry in done.entries)
    # It says in the store what it deleted.
    assert [path for path in after if path not in before] == [f"collected/{n}" for n in store.names("collected")]


def test_kept_runs_stay_whole_and_save_what_they_saved(store: Store) -> None:
    for size in (3, 5, 8):
        run(store, size)
    done = collect(store, graph(8), keep=1, older_than=0)
    assert (done.kept_runs, done.dropped_runs) == ((3,), (1, 2))
    assert_whole(store)
    assert store.run_numbers() == [3]
    assert {d.action for d in decide(store, graph(8)).values()} == {"finished"}
    # The grown pool costs what it would have cost: one part to read, one to compare.
    parts = {stage: set(store.names(f"parts/{stage}")) for stage in ("read", "compare")}
    assert {stage: len(keys) for stage, keys in parts.items()} == {"read": 8, "compare": 8}
    run(store, 9)
    assert {stage: len(set(store.names(f"parts/{stage}")) - keys) for stage, keys in parts.items()} == {
        "read": 1,
        "compare": 1,
    }
    assert store.run_numbers() == [3, 4]


def test_what_only_dropped_runs_need_goes_and_nothing_else(store: Store) -> None:
    run(store, 6)
    run(store, 2, name="other")
    shrunk = run(store, 3)
    done = collect(store, shrunk, keep=1, older_than=0)
    assert done.dropped_runs == (1,)
    # Of six files the data set has three now; the other data set needs two, which are the same ones.
    assert len(store.names("parts/read")) == len(store.names("parts/compare")) == 3
    assert_whole(store)
    assert {d.action for d in decide(store, graph(2)).values()} == {"finished"}
    assert collect(store, shrunk, keep=1, older_than=0).files == 0


def test_unfinished_work_stays_until_it_is_old(store: Store) -> None:
    run(store, 2)
    stages = graph(4)
    Runner(store, 1, no_ray, lambda event: None, launch=InThisProcess).run({"read/pool": stages["read/pool"]})
    store.commit_part("compare", "of a run that was killed", {})
    leftover = Path(store.path("parts/read/dead/0123456789ab-rows.parquet"))
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    assert collect(store, {}, keep=1).files == 0
    for path in (*Path(store.root).rglob("*"),):
        os.utime(path, (0, 0))
    # The configuration at hand goes on from what was read for it.
    gone = {entry.path for entry in collect(store, stages, keep=1).entries}
    assert gone == {"parts/read/dead/0123456789ab-rows.parquet"}
    assert decide(store, stages)["read/pool"].action == "finished"
    # No configuration asks for it any more: its artifact and the two parts that only it lists.
    kinds = [entry.path.split("/")[0] for entry in collect(store, graph(2), keep=1).entries]
    assert sorted(set(kinds)) == ["artifacts", "parts"]
    assert_whole(store)
    assert {d.action for d in decide(store, graph(2)).values()} == {"finished"}


def test_beside_a_run_nothing_of_what_it_has_made_goes(store: Store) -> None:
    run(store, 6)
    run(store, 3)
    old = graph(6)
    seen: list[Collected] = []

    def look(told: Callable[..., None]) -> Callable[..., None]:
        def watch(event: object) -> None:
            told(event)
            if getattr(event, "kind", "") == "finished" and not seen:
                seen.append(collect(store, graph(3), keep=1, older_than=0))

        return watch

    # A third run goes back to the first configuration, and finds its first stage finished: that must not go.
    with (
        claim(store, attempts.claim_name("zoo", None), "zoo"),
        attempts.attempt(store, old, lambda event: None, name="zoo") as told,
    ):
        Runner(store, 1, no_ray, look(told), launch=InThisProcess).run(old)
    assert seen
    assert_whole(store)
    assert decide(store, old)["read/pool"].action == "finished"


def test_while_a_run_is_at_work_nothing_goes_that_it_could_take_over(store: Store) -> None:
    """Parts of its stages are not listed anywhere yet, and it may find those of a dropped run."""
    run(store, 6)
    run(store, 3)
    store.commit_part("read", "made by the run at work", {})
    for path in Path(store.root).rglob("*"):
        os.utime(path, (0, 0))
    with claim(store, attempts.claim_name("other", None), "a run"):
        beside = collect(store, graph(3), keep=1, older_than=0)
        assert {entry.path.split("/")[0] for entry in beside.entries} <= {"logs", "reports", "cards"}
        assert beside.sums["busy"][0] > 6
    assert "parts/read/made by the run at work/manifest.json" in {
        entry.path for entry in collect(store, graph(3), keep=1, older_than=0).entries
    }


def test_a_run_that_ended_before_the_shards_replaces_none(store: Store) -> None:
    """`lodeset run --until` is on record, and what was published before it still counts."""
    first = run(store, 3, shards="write_shards/all")
    run(store, 5)
    assert collect(store, first, keep=1, older_than=0).kept_runs == (1, 2)
    assert_whole(store)
    assert {d.action for d in decide(store, first).values()} == {"finished"}
    run(store, 6, shards="write_shards/all")
    assert collect(store, graph(6), keep=1, older_than=0).kept_runs == (3,)


def test_what_a_killed_stage_has_finished_stays_for_the_configuration_that_goes_on(store: Store) -> None:
    run(store, 2)
    stages = graph(9)
    store.commit_part("read", "of the stage that is not done", {})
    for path in Path(store.root).rglob("*"):
        os.utime(path, (0, 0))
    assert collect(store, stages, keep=1).files == 0
    assert [entry.path for entry in collect(store, graph(2), keep=1).entries] == [
        "parts/read/of the stage that is not done/manifest.json"
    ]


def test_a_full_disk_is_collected(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of what was deleted finds room after it."""
    run(store, 6)
    run(store, 3)
    put, full = Store.put_absent, [True]

    def on_a_full_disk(self: Store, relative: str, data: bytes) -> bool:
        if full[0] and relative.startswith("collected/"):
            full[0] = False
            raise LodesetError("the store is full")
        return put(self, relative, data)

    monkeypatch.setattr(Store, "put_absent", on_a_full_disk)
    assert collect(store, graph(3), keep=1, older_than=0).files > 0
    assert len(store.names("collected")) == 1


def test_a_damaged_manifest_refuses_it(store: Store) -> None:
    run(store, 2)
    manifest = next(Path(store.root).glob("parts/read/*/manifest.json"))
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(LodesetError, match="so nobody knows what it lists"):
        collect(store, {})


def test_accepted_runs_stay(store: Store) -> None:
    for size in (2, 3, 4):
        run(store, size)
    assert collect(store, {}, keep=1, older_than=0, accepted=lambda: [1], dry_run=True).kept_runs == (1, 3)


# -- lists that artifacts share


@pytest.mark.parametrize("count", [0, 1, lists.SHORT, lists.SHORT + 1, 5_000, 40_000])
def test_long_lists_come_back_as_they_were(count: int) -> None:
    rows = [{"path": f"parts/embed/{n}/a.parquet", "rows": n} for n in range(count)]
    kept: dict[str, bytes] = {}
    tree = lists.packed(rows, kept.__setitem__)
    assert lists.unpacked(tree, kept.__getitem__) == rows
    assert lists.pieces(tree, kept.__getitem__) == set(kept)
    assert len(str(tree)) < 12_000 or count <= lists.SHORT


def test_runs_that_add_a_little_write_a_little() -> None:
    """100 runs that each insert ten rows at random: in full, they would write 100 times the list."""
    rng, kept, written = random.Random(0), dict[str, bytes](), []
    rows = [f"{rng.getrandbits(256):064x}" for _ in range(10_000)]
    lists.packed(rows, kept.__setitem__)
    for _ in range(100):
        for _ in range(10):
            rows.insert(rng.randrange(len(rows)), f"{rng.getrandbits(256):064x}")
        before = sum(map(len, kept.values()))
        assert lists.unpacked(lists.packed(rows, kept.__setitem__), kept.__getitem__) == rows
        written.append(sum(map(len, kept.values())) - before)
    whole = sum(len(row) for row in rows)
    assert sum(written) < 15 * whole  # a piece of about 64 rows for each of the ten
    assert sum(written[-10:]) < 1.5 * sum(written[:10])  # and not more with every run


def test_artifacts_share_lists_and_a_damaged_piece_is_written_again(store: Store) -> None:
    first = run(store, 100)
    pieces = store.names("lists")
    assert pieces
    run(store, 101)
    assert set(pieces) & set(store.names("lists"))
    artifact = decide(store, first)["read/pool"].artifact
    assert artifact is not None
    assert len(artifact.tables["rows"]) == 100
    piece = Path(store.path(sorted(store.pieces(artifact))[0]))
    good = piece.read_bytes()
    piece.write_bytes(good[:-1] + b" ")
    damage = contents(Store(store.url)).damage
    assert any("a piece of its lists" in one.why for one in damage)
    fresh = Store(store.url)
    fresh.delete(fresh.relative_manifest(artifact))
    fresh.commit_artifact(artifact)
    assert piece.read_bytes() == good
