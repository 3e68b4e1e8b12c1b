"""Embed against a bare onnxruntime loop over the same images: images/s of each.

    python benchmarks/embed.py POOL.tar MODEL.onnx [IMAGES] [ROUNDS]

The loop: two processes of one thread, each of which reads, decodes, resizes and runs batches of 32, and writes nothing.
Lodeset: the embed stage on a Ray cluster that is up, from its first part to its last committed one (engine start apart).
One run, interleaved; medians.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from lodeset.pipeline import graph
from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.dag.cluster import LOCAL
from lodeset.pipeline.dag.runner import Runner
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.embedders import networks
from lodeset.pipeline.embedders.config import OnnxEmbedder
from lodeset.pipeline.engines.ray import cluster

WORKERS, BATCH = 2, 32


def _half(job: tuple[str, str, int, int]) -> None:
    path, model, images, half = job
    embed = networks.onnx(OnnxEmbedder(kind="onnx", path=model), threads=1)
    with tarfile.open(path) as tar:
        members = [m for m in tar if m.isfile()][:images][half::WORKERS]
        for start in range(0, len(members), BATCH):
            batch = []
            for member in members[start : start + BATCH]:
                file = tar.extractfile(member)
                assert file is not None
                batch.append(decode(file.read()))
            embed(batch)


def loop_seconds(path: str, model: str, images: int) -> float:
    started = time.perf_counter()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_half, args=((path, model, images, half),)) for half in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


def lodeset_seconds(path: str, model: str) -> tuple[float, float]:
    """(seconds of the whole stage, seconds from when its workers were ready, by the parts' own clocks)."""
    folder = tempfile.mkdtemp(prefix="lodeset-bench-")
    try:
        config = CurationConfig.model_validate(
            {
                "store": folder,
                "pool": [path],
                "ingest": {"slice_mb": 1.0},
                "embed": {"semantic": {"kind": "onnx", "path": model, "batch": BATCH}},
            }
        )
        stages = graph.build(config)
        wanted = {id_: stages[id_] for id_ in ("ingest/pool", "embed/pool")}
        runner = Runner(Store(folder), WORKERS, lambda: cluster(LOCAL, WORKERS), lambda event: None)
        artifact = runner.run(wanted)["embed/pool"]
        # Two workers that are never idle spend twice the wall time between them.
        return artifact.seconds, artifact.details["embed_seconds"] / WORKERS
    finally:
        shutil.rmtree(folder)


def main() -> None:
    path, model = sys.argv[1], sys.argv[2]
    images = int(sys.argv[3]) if len(sys.argv) > 3 else 4000
    rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 3
    with tempfile.TemporaryDirectory() as folder:
        small = str(Path(folder) / "some.tar")
        with tarfile.open(path) as tar, tarfile.open(small, "w") as out:
            members = [m for m in tar if m.isfile()][:images]
            for member in members:
                out.addfile(member, tar.extractfile(member))
        times: dict[str, list[float]] = {"loop": [], "stage": [], "embedding": []}
        loop_seconds(small, model, min(images, 256))  # warm-up
        for _ in range(rounds):
            times["loop"].append(loop_seconds(small, model, images))
            whole, embedding = lodeset_seconds(small, model)
            times["stage"].append(whole)
            times["embedding"].append(embedding)
    rate = {name: round(len(members) / statistics.median(t), 1) for name, t in times.items()}
    share = rate["embedding"] / rate["loop"]
    print(
        json.dumps(
            {
                "benchmark": "embed",
                "images": len(members),
                "images_per_s": rate,
                "all": times,
                "share": round(share, 3),
                "asked": ">= 0.85",
            }
        )
    )


if __name__ == "__main__":
    main()
