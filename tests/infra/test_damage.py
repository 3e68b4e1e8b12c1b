"""A flipped bit, a missing file, an empty manifest: found by the next reader or by `verify`, and made again by a run."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import toy_stages
from inline import InThisProcess, no_ray

from lodeset.infra.upkeep.damage import mend, verify
from lodeset.pipeline.dag.damage import noted, withdraw
from lodeset.pipeline.dag.manifests import RUN, Made, Run, parsed, sealed
from lodeset.pipeline.dag.runner import Event, Runner
from lodeset.pipeline.dag.runs import Wanted, artifacts_of, newest_first, record, without_records
from lodeset.pipeline.dag.stage import Follows, Input, Stage
from lodeset.pipeline.dag.store import Artifact, Store, artifact_manifest, part_manifest, run_path
from lodeset.pipeline.errors import DamagedError, LodesetError

FOLDERS = ("parts", "artifacts", "shards", "runs")


def dag() -> dict[str, Stage]:
    first = Stage("a", "pool", 1, "beam", toy_stages.count, {"k": 1}, max_cpus=1)
    second = replace(first, name="b", inputs={"x": Input(first)}, function=toy_stages.with_shard)
    return {first.id: first, second.id: second}


def run(store: Store, stages: dict[str, Stage]) -> list[tuple[str, str]]:
    """What a run does to damage, and what it then makes."""
    events: list[Event] = []
    while mend(store, stages, "mine", events.append, {}):
        pass
    made = Runner(store, 2, no_ray, events.append, launch=InThisProcess).run(stages)
    record(store, Wanted("lodeset", None, "", {"k": 1}, tuple(stages)), made, {}, 0.0, 1.0)
    return [(event.kind, event.stage.name) for event in events if event.kind != "progress"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    run(Store(str(folder / "store")), dag())
    return folder / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    """A copy, which is as good as the store that it was copied from."""
    shutil.copytree(made, tmp_path / "store")
    return Store(str(tmp_path / "store"))


def files(store: Store) -> list[Path]:
    found = [p for folder in FOLDERS for p in sorted(Path(store.path(folder)).rglob("*")) if p.is_file()]
    assert {p.name for p in found} >= {"manifest.json", "000001.json", "shard-000000.tar"}
    return found


def flip(path: Path, seed: int) -> bytes:
    """Flips one bit; what was there before. The time stays, as it does where a disk forgets."""
    before, status = path.read_bytes(), path.stat()
    bit = random.Random(f"{path.name} {seed}").randrange(len(before) * 8)
    data = bytearray(before)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return before


def contents(store: Store) -> dict[str, str]:
    """The digest of every table and shard, by what it is rather than by the attempt that wrote it."""
    listed = (store.part(stage, key) for stage in store.names("parts") for key in store.names(f"parts/{stage}"))
    return {f"{part.key} {name}": file.sha256 for part in listed if part for name, file in part.files.items()}


def test_a_whole_store_is_found_whole_and_a_copy_too(store: Store) -> None:
    found = verify(store, deep=True)
    assert found.damage == () and found.files == 3 and found.manifests == 6
    assert run(store, dag()) == [("finished", "a"), ("finished", "b")]


def test_every_flipped_bit_is_found(store: Store) -> None:
    """In every table, shard and manifest, at several places of each, by a process that has read it whole before."""
    assert not verify(store, deep=True).damage
    for path in files(store):
        for seed in range(8):
            before = flip(path, seed)
            relative = path.relative_to(store.root).as_posix()
            assert relative in {one.path for one in verify(store, deep=True).damage}, (relative, seed)
            path.write_bytes(before)


def test_whatever_is_damaged_is_made_again(store: Store) -> None:
    before = contents(store)
    for path in files(store):
        flip(path, 1)
        verify(store, deep=True)
        check_made_again(store, before)
    assert run(store, dag()) == [("finished", "a"), ("finished", "b")]


@pytest.mark.parametrize("how", ["cut", "gone", "empty"])
def test_a_store_of_which_nothing_is_left_is_made_again(store: Store, how: str) -> None:
    before = contents(store)
    for path in files(store):
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-7] if how == "cut" else b"{}")
    check_made_again(store, before)


def check_made_again(store: Store, before: dict[str, str]) -> None:
    run(store, dag())
    assert verify(store, deep=True).damage == () and noted(store) == []
    assert contents(store) == before
    artifacts = artifacts_of(store, next(newest_first(store, "lodeset")))
    assert set(artifacts) == set(dag()) and artifacts["b/pool"].rows.kept == 2


def test_only_what_was_damaged_is_made_again(store: Store) -> None:
    (shard,) = Path(store.path("shards")).rglob("*.tar")
    flip(shard, 3)
    assert [one.path for one in verify(store, deep=True).damage] == [shard.relative_to(store.root).as_posix()]
    assert run(store, dag()) == [("damaged", "b"), ("finished", "a"), ("started", "b"), ("done", "b")]


def test_what_a_reader_meets_is_made_again_by_the_next_run(store: Store) -> None:
    first = store.history("a", "pool")[0].tables["rows"][0]
    flip(Path(store.path(first.path)), 5)
    again = Store(store.url)
    with pytest.raises(DamagedError, match=r"rows\.parquet is damaged: .* SHA-256 .*`lodeset run` makes again"):
        again.table([first], ["x"])
    assert [one.path for one in noted(again)] == [first.path]
    assert run(again, dag())[:2] == [("damaged", "a"), ("started", "a")]


def test_a_file_that_was_put_back_is_no_damage(store: Store) -> None:
    for path in files(store):
        before = flip(path, 2)
        assert verify(store, deep=True).damage
        path.write_bytes(before)
        assert withdraw(store, noted(store)).artifacts == () and noted(store) == []
    assert run(store, dag()) == [("finished", "a"), ("finished", "b")]


@pytest.mark.parametrize(
    "data", [b"{}", b"[]", b"", b"null", b"\xff", b'{"key": 3}', b'{"key": "k", "files": []}', b"5" * 6_000]
)
def test_a_manifest_that_says_something_else_is_a_sentence(store: Store, data: bytes) -> None:
    (key,) = store.names("parts/toy_shard")
    (fingerprint,) = store.names("artifacts/a/pool")
    readers = {
        part_manifest("toy_shard", key): lambda: store.part("toy_shard", key),
        artifact_manifest("a", "pool", fingerprint): lambda: store.history("a", "pool"),
        run_path(1): lambda: Store(store.url).run(1),
    }
    for relative, read in readers.items():
        assert read()
        Path(store.path(relative)).write_bytes(data)
        with pytest.raises(DamagedError, match=f"{Path(relative).name} is damaged: "):
            read()
    assert len(verify(store, deep=False).damage) >= 3
    run(store, dag())
    assert verify(store, deep=True).damage == ()


def test_a_checksum_covers_every_bit_of_a_manifest() -> None:
    run_ = Run(1, None, "n", None, "", {"a": [1.5]}, {"b/pool": Made("f", 1), "c/all": None}, {}, 0.0, 1.0)
    text = sealed({**vars(run_), "stages": {"b/pool": {"fingerprint": "f", "order": 1}, "c/all": None}})
    assert parsed(RUN, text) == run_
    for bit in range(len(text) * 8):
        data = bytearray(text)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            parsed(RUN, bytes(data))


def test_manifests_of_the_first_version_are_read(store: Store) -> None:
    """They have no checksum, artifacts no order, and there are no runs."""
    for path in files(store):
        if path.name == "manifest.json":
            tree = json.loads(path.read_text())
            tree.pop("checksum"), tree.pop("order", None)
            path.write_text(json.dumps(tree, indent=1))
    shutil.rmtree(store.path("runs"))
    old = Store(store.url)
    assert verify(old, deep=True).damage == ()
    assert set(without_records(old)) == set(dag())
    assert run(old, dag()) == [("finished", "a"), ("finished", "b")]
    assert [one.number for one in newest_first(old, "lodeset")] == [1]
    (key,) = old.names("parts/toy_shard")
    path = Path(old.path(part_manifest("toy_shard", key)))
    path.write_text(path.read_text().replace('"counts"', '"cuunts"'))
    with pytest.raises(DamagedError, match="cuunts"):
        old.part("toy_shard", key)


def test_runs_are_in_the_order_in_which_they_finished_whatever_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes back an hour with every run; each goes on from the one before it."""
    store, now = Store(str(tmp_path)), time.time()
    made: list[Artifact] = []
    for k in range(4):
        monkeypatch.setattr("lodeset.pipeline.dag.runner.time.time", lambda k=k: now - 3600 * k)
        go = Stage("go", "pool", 1, "beam", toy_stages.goes_on, {"k": k}, max_cpus=1, follows=Follows(()))
        run(store, {go.id: go})
        made.append(store.history("go", "pool")[0])
        assert made[-1].config == {"k": k}
        assert made[-1].details["from"] == (made[-2].fingerprint if k else None)
    assert [one.created for one in made] == sorted((one.created for one in made), reverse=True)
    runs = list(newest_first(store, "lodeset"))
    assert [(one.number, one.before) for one in runs] == [(4, 3), (3, 2), (2, 1), (1, None)]
    # Going back to the first configuration makes nothing, and what comes after it goes on from there.
    first = Stage("go", "pool", 1, "beam", toy_stages.goes_on, {"k": 0}, max_cpus=1, follows=Follows(()))
    assert run(store, {first.id: first}) == [("finished", "go")]
    assert store.history("go", "pool")[0] == made[0]
    fifth = replace(first, spec={"k": 5})
    run(store, {fifth.id: fifth})
    assert store.history("go", "pool")[0].details["from"] == made[0].fingerprint


def test_a_run_that_changes_nothing_leaves_no_record(store: Store) -> None:
    assert run(store, dag()) == [("finished", "a"), ("finished", "b")]
    assert store.run_numbers() == [1]
    with pytest.raises(LodesetError, match="has no run 7: it has run 1 alone"):
        store.run(7)


def test_a_stage_that_meets_other_bytes_leaves_a_note_of_the_source(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    stage = Stage("a", "pool", 1, "beam", toy_stages.meets_other_bytes, {}, max_cpus=1)
    with pytest.raises(LodesetError, match="no longer those that were ingested"):
        Runner(store, 1, no_ray, lambda _: None).run({stage.id: stage})
    (one,) = noted(store)
    assert (one.path, one.source) == ("/pool/a (1).png", True)
    assert withdraw(store, [one]).artifacts == () and noted(store) == []
