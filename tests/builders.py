"""Tiny images and archives with known truth."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from lodeset.pipeline.deduplication import Dedup, computed
from lodeset.pipeline.specs import DedupSpec


def pixels(seed: int, width: int = 48, height: int = 40) -> np.ndarray:
    """Smooth, distinct content: a few random blobs, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    image = np.full((height, width, 3), rng.uniform(0, 255, 3), np.float32)
    for _ in range(6):
        cx, cy, size = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(3, 16)
        weight = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * size**2))[..., None]
        image = image * (1 - weight) + weight * rng.uniform(0, 255, 3)
    return image.clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, **size: int) -> bytes:
    """One PNG."""
    return encoded(pixels(seed, **size))


def id_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_folder(folder: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_parquet(path: Path, images: Iterable[bytes], row_group_size: int = 4, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": list(images), **columns}), path, row_group_size=row_group_size)
    return path


def write_shards(folder: Path, payloads: list[bytes], shards: int = 2) -> str:
    """Tars and their index.parquet; returns the index's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for shard in range(shards):
        name = f"shard-{shard:06d}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for payload in payloads[shard::shards]:
                image_id = id_of(payload)
                member = tarfile.TarInfo(f"{image_id}.png")
                member.size = len(payload)
                rows.append((image_id, name, tar.offset + 512, len(payload)))
                tar.addfile(member, io.BytesIO(payload))
    ids, names, offsets, sizes = zip(*rows, strict=True)
    table = pa.table({"image_id": ids, "shard": names, "offset": offsets, "size_bytes": sizes})
    pq.write_table(table, folder / "index.parquet")
    return str(folder / "index.parquet")


def drawing(seed: int) -> Image.Image:
    """A smooth background with a dozen shapes on it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8))
    image = small.resize((160, 128), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, w, h = rng.uniform(0, 130), rng.uniform(0, 100), rng.uniform(8, 60), rng.uniform(8, 50)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return image


def thumbnail_of(image: Image.Image) -> np.ndarray:
    """32x32 luminance, uint8 [1024]."""
    return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)).reshape(-1)


def textured(seed: int, width: int = 160, height: int = 128) -> Image.Image:
    """Noise at several scales: every place is told from every other."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width))
    for size in (4, 10, 24):
        rough = Image.fromarray(rng.uniform(0, 255, (size, size)).astype(np.float32))
        total += np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((total / 3).clip(0, 255).astype(np.uint8)).convert("RGB")


def dedup_spec(**knobs: Any) -> DedupSpec:
    """What dedup is with these knobs, on a pool alone."""
    return DedupSpec(**computed(Dedup(**knobs)), roles={"pool": "pool"}, neighbors="auto", limit=None, name="lodeset")
