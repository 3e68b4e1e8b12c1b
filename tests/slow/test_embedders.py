"""Embedders as a run starts them: in Ray's workers, two at a time, a GPU for each worker."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from builders import picture
from commands import entries, typed
from inline import in_one_process
from runs import Run

from lodeset.pipeline.engines.ray import cores, map_with_state
from lodeset.training.config import ModelConfig
from lodeset.training.export import export
from lodeset.training.vit import DinoVisionTransformer

pytestmark = pytest.mark.slow


def test_a_run_with_two_embedders(tmp_path: Path) -> None:
    """An exported checkpoint and a dictionary, which is fitted before the one pass; then another dedup embedder."""
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    (tmp_path / "pool").mkdir()
    for n in range(60):
        (tmp_path / f"pool/{n}.png").write_bytes(picture(n))
    torch.manual_seed(0)
    export(DinoVisionTransformer(ModelConfig(patch_size=8, dim=16, depth=1, heads=2), 32), tmp_path / "export")
    tree = {
        "store": "./runs",
        "pool": [{"uri": "pool/"}],
        "ingest": {"slice_mb": 0.02},
        "embed": {
            "semantic": {"kind": "huggingface", "model": "export"},
            "dedup": {"kind": "patch_dictionary", "words": 16, "dimensions": 12},
        },
        "dedup": {"threshold": 0.9, "reference_threshold": 0.9},
        "resources": {"cpus": 2},
    }
    config = tmp_path / "lodeset.yaml"
    config.write_text(yaml.safe_dump(tree))
    code, err = Run(("run", config, "--until", "cluster")).start().wait()
    assert code == 0, err
    first = entries(config)
    parts = first["ingest/pool"]["details"]["parts"]
    assert parts > 1
    details = {stage: first[stage]["details"] for stage in ("embed/pool", "embed_dedup/pool")}
    assert details["embed/pool"]["parts_made"] == details["embed/pool"]["parts_made_beside"] == parts
    assert details["embed_dedup/pool"]["parts_made"] == 0
    assert first["embed/pool"]["rows"]["kept"] == first["embed_dedup/pool"]["rows"]["kept"] == 60

    tree["embed"]["dedup"] = {"kind": "huggingface", "model": "export", "pooling": "mean"}
    config.write_text(yaml.safe_dump(tree))
    with in_one_process():
        code, _, err = typed("run", config, "--until", "cluster")
    assert code == 0, err
    second = entries(config)
    assert second["embed/pool"]["manifest"] == first["embed/pool"]["manifest"]
    assert second["embed_dedup/pool"]["details"]["images_embedded"] == 60


HOST = """
import ray, sys
ray.init(num_cpus=4, num_gpus=2, _node_ip_address="127.0.0.2", include_dashboard=False, log_to_driver=False,
         object_store_memory=2**27)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def _told(item: int) -> tuple[str | None, int, int]:
    time.sleep(0.3)
    return os.environ.get("CUDA_VISIBLE_DEVICES"), cores(), os.getpid()


def _worker() -> Callable[[int], tuple[str | None, int, int]]:
    return _told


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback address is Linux's")
def test_each_worker_has_a_gpu_of_its_own() -> None:
    """Ray counts the GPUs that it is told of: two that are not there, on a node of four cores."""
    host = subprocess.Popen([sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert host.stdin is not None and host.stdout is not None
    try:
        address = next(line.split()[1].decode() for line in host.stdout if line.startswith(b"address"))
        pool = functools.partial(map_with_state, _worker, range(8), cpus=4, address=address)
        with_gpu, without = set(pool(gpu=True)), set(pool())
    finally:
        host.communicate(timeout=30)
    assert {(devices, threads) for devices, threads, _ in with_gpu} == {("0", 2), ("1", 2)}
    assert len(with_gpu) == 2
    assert {threads for _, threads, _ in without} == {1}
