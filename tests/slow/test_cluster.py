"""A run on a cluster of three nodes that share a store, from which nodes disappear."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from kills import COMMIT_S, PARTS, PATIENCE_S, committed_parts, parts_of
from nodes import Nodes, three_nodes
from runs import Run, WholeRun, shard_digests

pytestmark = pytest.mark.slow

MOVES_S = 60.0  # the longest time without a new part after a node was lost
ON_NODES = tuple(stage for stage in (*PARTS, "train") if stage not in ("ingest", "write_shards"))  # those are Beam's
SLOWER_COMMIT_S = 3 * COMMIT_S  # three nodes at once may not be done with the stage before one is killed
SEED = int(os.environ.get("LODESET_KILL_SEED", "0"))


@dataclass(frozen=True)
class Lost:
    """A node that was killed, and after how many seconds its stage committed the next part."""

    stage: str
    parts: int
    moved_s: float


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param([random.Random(SEED).choice(ON_NODES[:-1]), "train"], id="in a stage and in training"),
        pytest.param(list(ON_NODES), id="in every stage", marks=pytest.mark.kills),
    ],
)
def test_a_node_that_is_lost_costs_what_it_was_making(
    whole: WholeRun, tmp_path: Path, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    with three_nodes(tmp_path) as nodes, _run(whole, store, nodes, stages) as run:
        lost = list(_lose_in_each(run, nodes, store, stages, {stage: parts_of(whole.store, stage) for stage in stages}))
        code, err = run.wait(PATIENCE_S)
    with capsys.disabled():
        print("\n" + _table(lost))
    assert code == 0, err
    assert all(one.moved_s < MOVES_S for one in lost)
    assert shard_digests(store) == shard_digests(whole.store)
    weights = [next((s / "training").glob("*/model.safetensors")).read_bytes() for s in (store, whole.store)]
    assert weights[0] == weights[1]


@pytest.mark.kills
def test_a_node_that_is_cut_off_ends_or_resumes_its_stage(whole: WholeRun, tmp_path: Path) -> None:
    """Its processes are there and answer nobody: only the heartbeat tells."""
    store = tmp_path / "store"
    with three_nodes(tmp_path) as nodes, _run(whole, store, nodes, []) as run:
        _wait_for(run, store, "train", 2)
        frozen, began = nodes.freeze(), time.monotonic()
        before = parts_of(store, "train")
        while parts_of(store, "train") <= before + 2 and run.process is not None and run.process.poll() is None:
            assert time.monotonic() - began < 120, "neither ended nor resumed"
            time.sleep(0.2)
        took = time.monotonic() - began
        for process in frozen:
            if process.is_running():
                process.kill()
    assert took < MOVES_S + 10  # of which the heartbeat takes about 30


def _run(whole: WholeRun, store: Path, nodes: Nodes, slow: Sequence[str]) -> Run:
    command = ("run", whole.config, "--set", f"store={store}", "--set", f"resources.ray.address={nodes.address}")
    run = Run(
        command, slow_commit_s=SLOWER_COMMIT_S, slow_stages=tuple(PARTS[stage] for stage in slow if stage in PARTS)
    )
    return dataclasses.replace(run, environment=nodes.environment)


def _wait_for(run: Run, store: Path, stage: str, parts: int) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while (there := parts_of(store, stage)) < parts:
        assert run.process is not None and run.process.poll() is None, f"ended before {stage}: {run.wait()[1]}"
        assert time.monotonic() < deadline, f"{stage} has {there} parts after {PATIENCE_S} s"
        time.sleep(0.05)
    return there


def _lose_in_each(
    run: Run, nodes: Nodes, store: Path, stages: Sequence[str], totals: Mapping[str, int]
) -> Iterator[Lost]:
    """In whichever stage is at work: some may run in either order."""
    pending = list(stages)
    deadline = time.monotonic() + PATIENCE_S
    while pending:
        assert run.process is not None and run.process.poll() is None, f"ended before {pending}: {run.wait()[1]}"
        assert time.monotonic() < deadline, f"{pending} did not come in {PATIENCE_S} s"
        stage = next((one for one in pending if 2 <= parts_of(store, one) < totals[one]), None)
        if stage is not None:
            yield _lose(run, nodes, store, stage)
            pending.remove(stage)
            deadline = time.monotonic() + PATIENCE_S
        time.sleep(0.05)


def _lose(run: Run, nodes: Nodes, store: Path, stage: str) -> Lost:
    """Kills a node while the stage is at work, adds another, and waits for the stage's next part."""
    nodes.kill()
    began = time.monotonic()
    parts = parts_of(store, stage)  # before another node is up: the stage may end while it starts
    known = committed_parts(store)
    nodes.add()
    _wait_for(run, store, stage, parts + 1)
    moved = time.monotonic() - began
    now = committed_parts(store)
    assert {key: now.get(key) for key in known} == known, "parts were lost or written again"
    return Lost(stage, parts, moved)


def _table(lost: Sequence[Lost]) -> str:
    lines = ["| node lost in | parts committed | next part after, s |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {one.stage} | {one.parts} | {one.moved_s:.1f} |" for one in lost])
