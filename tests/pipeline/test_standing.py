"""What shards of the run before still stand for, on tables made by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest

from lodeset.pipeline.dag.stage import Context, Stage
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.stages.standing import Standing, changes, counted, leaked, shards_before, tombstones
from lodeset.pipeline.tables import records

# An index in `shards/b` that names shards of its own folder and of an earlier one.
INDEX = [
    ("a1", "shard-000002.tar"),
    ("a2", "shard-000002.tar"),
    ("b1", "../a/shard-000000.tar"),
    ("b2", "../a/shard-000000.tar"),
]
BURIED = [("c1", "../a/shard-000000.tar"), ("d1", "../a/shard-000001.tar")]


def shard_rows(rows: list[tuple[str, str]]) -> pa.Table:
    columns = [[i for i, _ in rows], [s for _, s in rows], list(range(len(rows))), [10] * len(rows)]
    return pa.table(columns, schema=records.SHARDS)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    store = Store(str(tmp_path))
    buried = shard_rows(BURIED).append_column("reason", pa.array(["gone"] * len(BURIED)))
    told = {"index": shard_rows(INDEX), "tombstones": buried}
    tables = {name: (store.write_named(f"{name}.parquet", table),) for name, table in told.items()}
    shards = tuple(File(path, 2, 99, "") for path in ("shards/a/shard-000000.tar", "shards/b/shard-000002.tar"))
    details = {"folder": "shards/b", "shards_numbered": 3}
    previous = Artifact(
        "write_shards", "all", 1, "p", {}, {}, {**tables, "shards": shards}, Rows(4, 4), details=details
    )
    duplicates = pa.table(
        {"image_id": ["a1", "b1", "c1", "n1"], "kept": [False, True, True, True], "reason": ["near", *["unique"] * 3]}
    )
    filtered = pa.table(
        {"image_id": ["a2"], "reason": ["min_side"], "score": [1.0], "threshold": [2.0]}, schema=records.FILTERED
    )
    inputs = {
        role: Artifact(
            role, "pool", 1, role, {}, {}, {name: (store.write_named(f"{role}.parquet", table),)}, Rows(0, 0)
        )
        for role, name, table in (("dedup", "duplicates", duplicates), ("masked", "filtered", filtered))
    }
    stage = Stage("write_shards", "all", 1, "beam", lambda _: pytest.fail("not run"), {})
    return Context(store, stage, "f", inputs, 1, lambda _: None, previous)


def standing(context: Context, *selected: str) -> Standing:
    return shards_before(context.store, context.previous, pa.chunked_array([list(selected)], pa.string()))


def test_what_is_still_selected_stays_where_it_lies(context: Context) -> None:
    found = standing(context, "a1", "b2", "n1")
    assert dict(zip(*found.live.select(["image_id", "shard"]).to_pydict().values(), strict=True)) == {
        "a1": "../b/shard-000002.tar",
        "b2": "../a/shard-000000.tar",
    }
    assert sorted(found.dead["image_id"].to_pylist()) == ["a2", "b1", "c1", "d1"]
    assert [file.path for file in found.files] == ["shards/a/shard-000000.tar", "shards/b/shard-000002.tar"]
    assert found.numbered == 3
    # A shard of which nothing counts is no longer one of them.
    assert [file.path for file in standing(context, "b1").files] == ["shards/a/shard-000000.tar"]


def test_what_was_dropped_and_is_wanted_again_is_revived_where_its_shard_stands(context: Context) -> None:
    found = standing(context, "b1", "c1", "d1")
    # d1 lay in a shard that is listed no more: it is written anew, and no tombstone.
    assert found.live["image_id"].to_pylist() == ["b1", "c1"]
    assert sorted(found.dead["image_id"].to_pylist()) == ["a1", "a2", "b2"]


def test_changes_and_tombstones_say_why(context: Context) -> None:
    found = standing(context, "c1", "n1")
    selected = pa.table({"image_id": ["c1", "n1", "n1"], "set": ["x", "x", "y"], "mode": ["as_is", "sample", "as_is"]})
    buried_now = tombstones(context.store, context, found.dead)
    told = changes(context, found, buried_now, pa.chunked_array([["n1"]], pa.string()), selected)
    assert {row["image_id"]: (row["change"], row["reason"]) for row in told.to_pylist()} == {
        "n1": ("added", "x sample"),
        "c1": ("added", "x as_is"),
        "a1": ("removed", "near"),
        "a2": ("removed", "min_side"),
        "b1": ("removed", "not_selected"),
        "b2": ("removed", "gone"),
    }
    assert counted(told) == {
        "added": {"x as_is": 1, "x sample": 1},
        "removed": {"gone": 1, "min_side": 1, "near": 1, "not_selected": 1},
    }
    buried = {row["image_id"]: row["reason"] for row in tombstones(context.store, context, found.dead).to_pylist()}
    assert leaked(tombstones(context.store, context, found.dead)) == []
    (warning,) = leaked(shard_rows(INDEX).append_column("reason", pa.array(["reference", "near", "gone", "reference"])))
    assert warning.startswith("2 images")
    assert buried == {"a1": "near", "a2": "min_side", "b1": "not_selected", "b2": "gone", "d1": "gone"}


def test_a_first_run_changes_nothing(context: Context) -> None:
    first = dataclasses.replace(context, previous=None)
    found = standing(first, "n1")
    assert not found.live.num_rows and not found.files and found.numbered == 0
    written = pa.chunked_array([["n1"]], pa.string())
    selected = pa.table({"image_id": ["n1"], "set": ["x"], "mode": ["as_is"]})
    buried = tombstones(first.store, first, found.dead)
    assert not buried.num_rows and not changes(first, found, buried, written, selected).num_rows
