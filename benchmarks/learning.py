"""What DINOv2 pretraining learns of CIFAR-10 on two cores, without labels: kNN accuracy against images and minutes.

    python benchmarks/learning.py INDEX.parquet GALLERY.parquet TEST.parquet FOLDER [STEPS]

INDEX is the index of shards that lodeset wrote of the training images. Gallery: 10,000 of the training images with their labels, drawn
by seed; test: all images of TEST. The teacher of every checkpoint is evaluated, raw pixels and the untrained network beside it. A run
that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.training.checkpoint import MARKER, read_checkpoint
from lodeset.training.config import TrainingConfig
from lodeset.training.evaluate import features, knn_accuracy
from lodeset.training.index import Shards
from lodeset.training.launch import launch
from lodeset.training.metrics import FILE as METRICS
from lodeset.training.ssl import student_and_teacher

GALLERY, K = 10_000, (10, 20, 100, 200)
BATCH, CHECKPOINT = 64, 1_000
STEPS = 7_500


def config_of(steps: int) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "steps": steps,
            "batch": BATCH,
            "precision": "bf16",
            "checkpoint_every": CHECKPOINT,
            "keep_checkpoints": 1000,
            "log_every": 50,
            "model": {"patch_size": 4, "dim": 128, "depth": 6, "heads": 2, "drop_path": 0.1},
            "heads": {"prototypes": 512},
            # What helped in runs of 64,000 images (docs/log.md).
            "crops": {
                "global_size": 32,
                "local_size": 16,
                "local_count": 4,
                "global_scale": (0.5, 1.0),
                "local_scale": (0.2, 0.6),
                "blur": (0.0, 0.0, 0.0),
                "solarise": 0.0,
            },
            "teacher": {"momentum_start": 0.99, "temperature_end": 0.04},
            "optimiser": {"layer_decay": 1.0, "patch_embed_lr": 1.0},
        }
    )


def labelled(path: str, count: int | None) -> tuple[list[NDArray[np.uint8]], list[str]]:
    table = pq.read_table(path, columns=["image", "label"])
    if count is not None:
        rows = np.random.default_rng(0).permutation(len(table))[:count]
        table = table.take(np.sort(rows))
    encoded = table["image"].to_pylist()
    found = [np.asarray(decode(one["bytes"] if isinstance(one, dict) else one, 10**6)) for one in encoded]
    return found, table["label"].to_pylist()


def main() -> None:
    index, gallery_path, test_path, folder = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    config = config_of(int(sys.argv[5]) if len(sys.argv) > 5 else STEPS)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    summary = launch(config, Shards(index=(index,)), folder, cpus=2)
    ray.shutdown()
    print(json.dumps(summary), flush=True)

    gallery, test = labelled(gallery_path, GALLERY), labelled(test_path, None)

    def told(name: str, vectors: list[NDArray[np.float32]], **more: float) -> None:
        scores = {f"k={k}": round(knn_accuracy(vectors[0], gallery[1], vectors[1], test[1], k), 4) for k in K}
        print(json.dumps({"features": name, **more, **scores}), flush=True)

    raw = [np.stack([image.ravel() for image in images]).astype(np.float32) for images, _ in (gallery, test)]
    told("raw pixels", [one / np.linalg.norm(one, axis=1, keepdims=True) for one in raw])
    _, teacher = student_and_teacher(config)
    size = config.crops.global_size
    told("untrained", [features(teacher.backbone, images, size, 256) for images, _ in (gallery, test)])
    minutes = minutes_at(folder, config)
    for path in sorted(folder.glob("step-*")):
        step = json.loads((path / MARKER).read_text())["step"]
        teacher.backbone.load_state_dict(read_checkpoint(path, "teacher.backbone."))
        more = {"images": step * config.batch, "minutes": round(minutes[step], 1)}
        told("trained", [features(teacher.backbone, images, size, 256) for images, _ in (gallery, test)], **more)


def minutes_at(folder: Path, config: TrainingConfig) -> dict[int, float]:
    """Minutes of training until each logged step, whatever interrupted it in between."""
    found, total, before = {}, 0.0, 0
    for line in map(json.loads, (folder / METRICS).read_text().splitlines()):
        total += (line["step"] - before) * config.batch / line["images_per_s"] / 60
        before = line["step"]
        found[before] = total
    return found


if __name__ == "__main__":
    main()
