"""kill -9 of the driver, and of workers, in the middle of stages; then the run goes on as if nothing had happened.

One run is killed again and again, and started again whenever it has ended: in a store of its own, from ingest to pruning. Nothing
that it committed may be lost or made again, and in the end its shards and its weights are those of a run that was left alone.

A kill matters per mechanism, so the slow tests kill a run once in each, at stages that LODESET_KILL_SEED draws.
`make test-kills` kills at forty drawn moments, and prints a table.
"""

from __future__ import annotations

import ipaddress
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from kills import COMMIT_S, PARTS, PATIENCE_S, committed_parts, parts_of
from runs import Run, WholeRun, Worker, shard_digests

pytestmark = pytest.mark.slow

STAGES = (*PARTS, "train")  # whose parts are checkpoints
WORKERS: dict[str, Worker] = {"ingest": "pool", "write_shards": "pool", "train": "training"}  # others: "ray"
FEWEST_PARTS = 8
AFTER = 2  # parts that are committed between two kills in one stage, unless drawn


@dataclass(frozen=True)
class Kill:
    """Of the driver, of a worker, or of a whole Ray node, in a stage, once it has committed so many more parts."""

    victim: Literal["driver", "worker", "node"]
    stage: str
    after: int = AFTER


@dataclass(frozen=True)
class Done:
    """A kill: how many parts of its stage were committed by then, whether the run went on by itself, and how long it took until
    no process was left of it otherwise."""

    kill: Kill
    parts: int
    survived: bool
    gone_s: float = 0.0


def one_each(seed: int) -> list[Kill]:
    """A kill for every mechanism, in the order of the stages."""
    rng = random.Random(seed)
    by_ray = [stage for stage in PARTS if stage not in WORKERS]
    chosen = [
        Kill("driver", rng.choice(list(PARTS))),
        Kill("worker", rng.choice(["ingest", "write_shards"])),
        Kill("worker", rng.choice(by_ray)),
        Kill("worker", "train"),
        Kill("driver", "train"),
    ]
    return sorted(chosen, key=lambda kill: STAGES.index(kill.stage))


def forty(seed: int) -> list[Kill]:
    """Ten kills each of the driver, of a worker of a pool or of Ray, of a whole Ray node, and of a training worker."""
    rng = random.Random(seed)
    by_ray = [stage for stage in PARTS if stage not in WORKERS]

    def spread(stages: Sequence[str]) -> list[str]:
        """Ten stages, none more than once more often than another: each has few parts to be killed among."""
        return [stage for _ in range(-(-10 // len(stages))) for stage in rng.sample(list(stages), len(stages))][:10]

    kills = [Kill("driver", stage, rng.choice((1, 2))) for stage in spread(list(PARTS))]
    kills += [Kill("worker", stage, rng.choice((1, 2))) for stage in spread(list(PARTS))]
    kills += [Kill("node", stage, rng.choice((1, 2))) for stage in spread([*by_ray, "train"])]
    kills += [Kill("worker", "train", 1) for _ in range(10)]
    rng.shuffle(kills)
    return sorted(kills, key=lambda kill: STAGES.index(kill.stage))


SEED = int(os.environ.get("LODESET_KILL_SEED", "0"))


def test_nothing_listens_beyond_loopback(whole: WholeRun) -> None:
    """In any stage: curation, training, evaluation and pruning ran."""
    assert any("raylet" in name for _, name in whole.heard), whole.heard
    assert all(ipaddress.ip_address(a.removeprefix("::ffff:")).is_loopback for a, _ in whole.heard), whole.heard


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(one_each(SEED), id="once in each mechanism"),
        pytest.param(forty(SEED), id="forty times", marks=pytest.mark.kills),
    ],
)
def test_a_run_that_is_killed_goes_on(
    whole: WholeRun, tmp_path: Path, kills: list[Kill], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {stage: parts_of(whole.store, stage) for stage in STAGES}
    assert all(count >= FEWEST_PARTS for count in counts.values()), f"too few parts to be killed among: {counts}"
    store = tmp_path / "store"
    with capsys.disabled():
        print(f"\nkills: {', '.join(f'{kill.victim} in {kill.stage}' for kill in kills)}")
        done = _disturbed(("run", whole.config, "--set", f"store={store}"), store, kills)
        print(_table(done))
    assert shard_digests(store) == shard_digests(whole.store)
    weights = [next((s / "training").glob("*/model.safetensors")).read_bytes() for s in (store, whole.store)]
    assert weights[0] == weights[1]


def _disturbed(command: tuple[str | Path, ...], store: Path, kills: Sequence[Kill]) -> list[Done]:
    """Runs the command until it has done everything, and kills it as asked on the way."""
    pending, done = list(kills), []
    committed: dict[tuple[str, str], tuple[int, str]] = {}
    slow = tuple(PARTS[kill.stage] for kill in kills if kill.stage in PARTS)
    code = None
    while code != 0:
        with Run(command, slow_commit_s=COMMIT_S, slow_stages=slow) as run:
            last = _killed(run, store, pending, committed)
            code, err = run.wait(PATIENCE_S)
            assert "Traceback" not in err, err
            # An engine may replace a worker and go on. If it cannot, the run says so and stops.
            assert last or code == 0, err
            began = time.monotonic()
            assert run.gone_within(60), run.processes()
            for n, one in enumerate(last, start=1):
                died = n == len(last) and code != 0
                done.append(Done(one.kill, one.parts, not died, time.monotonic() - began if died else 0.0))
    assert not pending, f"never came to be killed: {pending}"
    now = committed_parts(store)
    assert {key: now.get(key) for key in committed} == committed, "parts were lost or written again"
    return done


def _killed(
    run: Run, store: Path, pending: list[Kill], committed: dict[tuple[str, str], tuple[int, str]]
) -> list[Done]:
    """Kills until the driver is killed or ends; takes what it killed off the list, and notes what was committed by then."""
    assert run.process is not None
    done: list[Done] = []
    deadline = time.monotonic() + PATIENCE_S
    before = {stage: parts_of(store, stage) for stage in STAGES}
    while run.process.poll() is None:
        assert time.monotonic() < deadline, f"not done after {PATIENCE_S} s; pending: {pending}"
        time.sleep(0.02)
        for stage in dict.fromkeys(kill.stage for kill in pending):
            parts, kill = parts_of(store, stage), next(kill for kill in pending if kill.stage == stage)
            if parts < before[stage] + kill.after:
                continue
            # What is committed before a worker's kill counts: the run that goes on may not touch it either.
            known = committed_parts(store)
            if kill.victim == "driver":
                run.kill_driver()
                run.process.wait()
                known = committed_parts(store)
            elif not run.kill_worker("node" if kill.victim == "node" else WORKERS.get(stage, "ray")):
                continue
            committed.update(known)
            pending.remove(kill)
            done.append(Done(kill, parts, survived=True))
            if kill.victim == "driver":
                return done
            before[stage] = parts_of(store, stage)
    return done


def _table(done: Sequence[Done]) -> str:
    lines = ["| stage | killed | parts committed | the run |", "| --- | --- | --- | --- |"]
    for one in done:
        after = (
            "went on"
            if one.survived
            else f"ended, all processes gone after {one.gone_s:.1f} s; went on when started again"
        )
        lines.append(f"| {one.kill.stage} | {one.kill.victim} | {one.parts} | {after} |")
    return "\n".join(lines)
