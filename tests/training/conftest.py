"""A few hundred drawn images in real shards, and a configuration that trains on them in seconds."""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from training.config import TrainingConfig


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, payloads: list[bytes], shards: int = 2) -> str:
    """Tars and their index.parquet; returns the index's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for shard in range(shards):
        name = f"shard-{shard:06d}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for payload in payloads[shard::shards]:
                image_id = hashlib.sha256(payload).hexdigest()[:32]
                member = tarfile.TarInfo(f"{image_id}.png")
                member.size = len(payload)
                rows.append((image_id, name, tar.offset + 512, len(payload)))
                tar.addfile(member, io.BytesIO(payload))
    ids, names, offsets, sizes = zip(*rows, strict=True)
    table = pa.table({"image_id": ids, "shard": names, "offset": offsets, "size_bytes": sizes})
    pq.write_table(table, folder / "index.parquet")
    return str(folder / "index.parquet")


@pytest.fixture(scope="session")
def payloads() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (20 + i % 3, 24, 3), dtype=np.uint8)) for i in range(22)]


@pytest.fixture(scope="session")
def index_url(tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes]) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), payloads)


@pytest.fixture
def small() -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "steps": 6,
            "batch": 8,
            "log_every": 1,
            "checkpoint_every": 3,
            "model": {"dim": 16, "depth": 2, "heads": 2, "drop_path": 0.25, "registers": 1},
            "crops": {"global_size": 32, "local_size": 16, "local_count": 2},
            "heads": {"prototypes": 12, "hidden": 16, "dino_bottleneck": 8, "ibot_bottleneck": 8},
        }
    )
