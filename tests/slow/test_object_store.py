"""A whole run with training and pruning on an object store of which 5 % of the requests fail: the same bytes and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from buckets import environment, s3_server
from commands import typed
from fault_proxy import FaultProxy
from inline import in_one_process
from object_stores import RATES, copied_to, placed, run, world

pytestmark = pytest.mark.slow


def test_five_percent_of_the_requests_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LODESET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("LODESET_SILENCE_S", "2")
    config = world(tmp_path / "world")
    with in_one_process():  # the same bytes, sooner; then training and pruning
        typed("run", placed(config, "local", "./local"), "--until", "write_shards")
    local = run(placed(config, "local", "./local"))
    with (
        s3_server("bucket") as address,
        FaultProxy(address, RATES, seed=5, silence_s=6.0) as proxy,
        environment(AWS_ENDPOINT_URL=proxy.url),
    ):
        copied_to(config, "s3://bucket/world")
        spoiled = run(placed(config, "bad", "s3://bucket/runs", "s3://bucket/world"))
    assert spoiled.digests == local.digests
    assert spoiled.weights == local.weights
    assert len(local.weights) > 100 and sum(name.startswith("shards") for name in local.digests) > 2
    faults = sum(proxy.faults.values())
    assert 0.03 < faults / proxy.requests < 0.08 and len(proxy.faults) == len(RATES)
    assert "the store or a source was slow:" in spoiled.told and "testing-key" not in spoiled.told
