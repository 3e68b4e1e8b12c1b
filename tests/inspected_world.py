"""A store of a finished run with as many images as asked for, made without running a stage: tables with known contents, any size.

Pool, a reference set, a curated set; clusters of vectors, near-duplicate groups, filter reasons, shards. With `pictures`, the images are
there, so thumbnails can be made of them. What dedup and retrieval decided is computed by their own rules from drawn pairs and hits.
"""

from __future__ import annotations

import dataclasses
import io
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from builders import dedup_spec
from inline import in_one_process
from PIL import Image

from lodeset.infra.config import read
from lodeset.infra.dashboard.making import Inspected, inspect
from lodeset.infra.looking.held import configuration
from lodeset.infra.session import Opened, open_store
from lodeset.pipeline.algorithms.copies.components import components
from lodeset.pipeline.algorithms.copies.keepers import Looks, keepers
from lodeset.pipeline.algorithms.images.decoding import image_id
from lodeset.pipeline.dag.fingerprint import canonical, digest
from lodeset.pipeline.dag.runs import Wanted, record
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.stages.dedup.outcomes import outcomes
from lodeset.pipeline.stages.write_shards import INDEX
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.vectors import normalised, vector_table

HOSTILE = '"><img src=x onerror=alert(1)>.jpg'
REASONS = ("blurry", "min_side", "nsfw")
MIN_SCORE = 4.0


@dataclasses.dataclass
class Maker:
    """Puts artifacts into a store, with the inputs that they would have."""

    store: Store
    seed: int
    made: dict[str, Artifact] = dataclasses.field(default_factory=dict)

    def put(
        self,
        id_: str,
        tables: Mapping[str, list[pa.Table | File]],
        rows: Rows,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        details: Mapping[str, Any] | None = None,
        content: Mapping[str, str] | None = None,
        version: int = 1,
    ) -> None:
        stage, _, set_ = id_.partition("/")
        files: dict[str, tuple[File, ...]] = {}
        for name, some in tables.items():
            written = []
            for number, one in enumerate(some):
                if not isinstance(one, File):
                    # Tables of one part lie together, as ingest's do.
                    beside = {
                        n: t[number] for n, t in tables.items() if len(t) > number and isinstance(t[number], pa.Table)
                    }
                    kind = INDEX if name == "index" else stage
                    one = self.store.commit_part(kind, digest(id_, number, self.seed), beside).files[name]
                written.append(one)
            files[name] = tuple(written)
        told = {
            role: {
                "stage": source,
                "identity": self.made[source].fingerprint,
                "fingerprint": self.made[source].fingerprint,
            }
            for role, source in inputs.items()
        }
        self.made[id_] = self.store.commit_artifact(
            Artifact(
                stage, set_, version, digest(id_, self.seed), config, told, files, rows, content or {"images": digest(id_, self.seed)},
                details or {}, seconds=1.0, created=time.time(), used={},
            )
        )  # fmt: skip


def ids_of(rng: np.random.Generator, count: int) -> list[str]:
    text = rng.bytes(16 * count).hex()
    return [text[32 * n : 32 * n + 32] for n in range(count)]


def picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((96, 72), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def make(
    folder: Path,
    images: int,
    *,
    pictures: bool = False,
    seed: int = 0,
    width: int = 32,
    part: int = 50_000,
    decided: int | None = None,
) -> Path:
    """Returns the configuration of a store with a finished run over `images` pool images. With `decided`, everything after embed is
    drawn anew: on the same folder, that makes a second run over the same images.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "lodeset.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "name": "inspected", "store": str(folder / "store"), "pool": str(folder / "pool.tar"),
                "reference": [{"name": "test-set", "uri": str(folder / "test-set.tar")}],
                "curated": [{"name": "flowers", "uri": str(folder / "flowers.tar"), "retrieve": {"mode": "sample", "k": 4}}],
                "dedup": {"threshold": 0.6, "reference_threshold": 0.5}, "cluster": {"k": 8},
            }
        )
    )  # fmt: skip
    maker = Maker(Store(str(folder / "store")), seed)
    maker.store.prepare()
    sizes = {"pool": images, "test-set": max(4, images // 500), "flowers": max(4, min(200, images // 50))}
    ids, areas = dict[str, list[str]](), dict[str, int]()
    for name, count in sizes.items():
        ids[name], drawn = _ingest(maker, folder, name, count, rng, pictures, part)
        areas |= zip(ids[name], drawn.tolist(), strict=True)
    vectors = {name: _embed(maker, name, ids[name], rng, width, part) for name in ids}
    if decided is not None:
        maker.seed, rng = decided, np.random.default_rng(decided)
    masked = _filter(maker, ids["pool"], rng)
    kept = _dedup(maker, ids, areas, masked, rng)
    _clusters(maker, kept, ids["pool"], vectors["pool"], rng, part)
    _shards(maker, ids, kept, rng)
    settings = read(config)
    wanted = Wanted(settings.name, None, "", configuration(settings), tuple(maker.made))
    record(maker.store, wanted, maker.made, {"lodeset": "0"}, time.time() - 60, time.time())
    return config


def _ingest(
    maker: Maker, folder: Path, name: str, count: int, rng: np.random.Generator, pictures: bool, part: int
) -> tuple[list[str], np.ndarray]:
    """Returns the image_ids and the areas of the images."""
    tar, offsets, sizes = folder / f"{name}.tar", np.zeros(count, np.int64), np.full(count, 1_000)
    if pictures:
        data = [picture(hash_) for hash_ in rng.integers(0, 2**31, count).tolist()]
        ids = [image_id(one) for one in data]
        with tarfile.open(tar, "w") as sink:
            for n, one in enumerate(data):
                member = tarfile.TarInfo(_member(n))
                member.size = sizes[n] = len(one)
                offsets[n] = sink.offset + 512
                sink.addfile(member, io.BytesIO(one))
    else:
        ids = ids_of(rng, count)
    tables: dict[str, list[pa.Table | File]] = {"images": [], "locations": [], "metadata": [], "rejects": []}
    areas = np.zeros(count, np.int64)
    for start in range(0, count, part):
        some = slice(start, min(start + part, count))
        n = some.stop - some.start
        width, height = (rng.integers(32, 640, n).astype(np.int32) for _ in range(2))
        areas[some] = width.astype(np.int64) * height
        gray = bytes(range(256)) * 4
        tables["images"].append(
            pa.table(
                {
                    "image_id": ids[some], "set": pa.repeat(name, n), "width": width,
                    "height": height, "format": pa.repeat("JPEG", n), "size_bytes": sizes[some],
                    "phash": rng.integers(0, 2**63, n).astype(np.uint64), "thumbnail": pa.repeat(gray, n),
                    "derived_from": pa.nulls(n, pa.string()), "sample_range": pa.nulls(n, pa.string()),
                    "truncated": pa.nulls(n, pa.float32()), "located": np.zeros(n, bool),
                    **{c: rng.uniform(1, 90, n).astype(np.float32) for c in ("detail", "sharpness", "quality")},
                },
                schema=records.IMAGES,
            )
        )  # fmt: skip
        tables["locations"].append(
            pa.table(
                {
                    "set": pa.repeat(name, n), "uri": pa.repeat(str(tar), n), "member": [_member(k) for k in range(start, some.stop)],
                    "offset": offsets[some], "image_id": ids[some], "size_bytes": sizes[some],
                },
                schema=records.LOCATIONS,
            )
        )  # fmt: skip
        labels = [f"class-{k}" for k in rng.integers(0, 10, n)]
        said = {"image_id": ids[some], "source": ids[some], "label": labels}
        said |= {c: pa.nulls(n, pa.string()) for c in ("caption", "url", "licence", "extra")}
        tables["metadata"].append(pa.table(said, schema=records.METADATA))
        tables["rejects"].append(records.REJECTS.empty_table())
    maker.put(f"ingest/{name}", tables, Rows(count, count), {"max_pixels": 10**8}, {})
    return ids, areas


def _member(number: int) -> str:
    return HOSTILE if number == 1 else f"{number:08}.jpg"


def _embed(maker: Maker, name: str, ids: list[str], rng: np.random.Generator, width: int, part: int) -> np.ndarray:
    centers = np.random.default_rng(7).normal(size=(8, width))
    where = rng.integers(0, 8, len(ids))
    vectors = normalised((centers[where] + 0.6 * rng.normal(size=(len(ids), width))).astype(np.float32))
    tables = [vector_table(ids[k : k + part], vectors[k : k + part]) for k in range(0, len(ids), part)]
    maker.put(
        f"embed/{name}", {"vectors": tables}, Rows(len(ids), len(ids)), {"embedder": "drawn"}, {"images": f"ingest/{name}"}
    )  # fmt: skip
    return vectors


def _filter(maker: Maker, pool: list[str], rng: np.random.Generator) -> set[str]:
    rows = np.flatnonzero(rng.random(len(pool)) < 0.05)
    reasons = [REASONS[k] for k in rng.integers(0, len(REASONS), len(rows))]
    ids = [pool[row] for row in rows]
    table = pa.table(
        {"image_id": ids, "reason": reasons, "score": rng.random(len(rows)), "threshold": np.full(len(rows), 0.5)},
        schema=records.FILTERED,
    )
    counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    maker.put(
        "filter/pool", {"filtered": [table]}, Rows(len(pool), len(pool) - len(ids), counts), {}, {"images": "ingest/pool"}
    )  # fmt: skip
    return set(ids)


def _dedup(
    maker: Maker, ids: Mapping[str, list[str]], areas: Mapping[str, int], masked: set[str], rng: np.random.Generator
) -> list[str]:
    """Pairs of drawn scores, and what the rules of dedup make of them; returns the images of the pool that it kept."""
    pool = [image_id for image_id in ids["pool"] if image_id not in masked]
    every = sorted({*pool, *ids["test-set"]})
    number = {image_id: n for n, image_id in enumerate(every)}
    count, pairs = len(every), max(6, len(every) // 3)
    in_pool = np.zeros(count, bool)
    in_pool[[number[i] for i in pool]] = True
    reference = np.zeros(count, bool)
    reference[[number[i] for i in ids["test-set"]]] = True
    a = rng.integers(0, count, pairs)
    b = np.where(rng.random(pairs) < 0.5, (a + 1) % count, (a + rng.integers(1, 9, pairs)) % count)
    key = np.unique(np.minimum(a, b) * count + np.maximum(a, b))
    a, b = key // count, key % count
    a, b = a[a != b], b[a != b]
    limit = rng.normal(3.0, 2.5, len(a)).astype(np.float32)
    limit[rng.random(len(a)) < 0.1] = np.inf
    limit[rng.random(len(a)) < 0.2] = np.nan
    linked = np.nan_to_num(limit, nan=-np.inf, posinf=np.inf) >= MIN_SCORE
    component = components(count, a[linked], b[linked])
    looks = Looks(
        standing=np.zeros(count, bool), area=np.array([areas[one] for one in every]), detail=np.ones(count), sharpness=np.ones(count),
        quality=np.ones(count), contrast=np.full(count, 900.0), said=np.zeros(count, np.int64),
    )  # fmt: skip
    nobody = np.zeros(count, bool)
    found = outcomes(in_pool, reference, nobody, component, keepers(component, looks, ("area",)))
    names = pa.array(every, pa.string())
    rows = np.flatnonzero(in_pool)
    match = np.where(found.kept, -1, found.match)[rows]
    duplicates = pa.table(
        {
            "image_id": names.take(pa.array(rows)), "group_id": names.take(pa.array(component[rows])), "kept": found.kept[rows],
            "reason": found.reason[rows].tolist(), "matched_id": names.take(pa.array(np.maximum(match, 0), mask=match < 0)),
            "similarity": pa.array(rng.random(len(rows)).astype(np.float32), mask=match < 0),
        },
        schema=records.DUPLICATES,
    )  # fmt: skip
    size = len(a)
    scored = np.isfinite(limit)
    edges = pa.table(
        {
            "image_id_a": names.take(pa.array(a)), "image_id_b": names.take(pa.array(b)), "similarity": rng.random(size).astype(np.float32),
            "phash_distance": rng.integers(0, 40, size).astype(np.int16), "verified": linked,
            "transform": pa.repeat("identity", size), "score": pa.array(limit, mask=~scored),
            "map": pa.array([[1, 0, 0, 0, 1, 0] if s else None for s in scored.tolist()], pa.list_(pa.float32())),
            "points": pa.nulls(size, pa.int16()), "linked": linked,
            "detail_score": pa.nulls(size, pa.float32()), "min_score_limit": pa.array(limit, mask=np.isnan(limit)),
        },
        schema=records.EDGES,
    )  # fmt: skip
    of = np.flatnonzero(found.reason[rows] == "reference")
    leaks = pa.table(
        {
            "set": pa.repeat("test-set", len(of)), "image_id": names.take(pa.array(found.match[rows[of]])),
            "pool_image_id": names.take(pa.array(rows[of])), "similarity": pa.nulls(len(of), pa.float32()),
            "verified": pa.nulls(len(of), pa.bool_()),
        },
        schema=records.LEAKS,
    )  # fmt: skip
    reasons = found.reason[rows][~found.kept[rows]].tolist()
    dropped = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    spec = dataclasses.replace(
        dedup_spec(
            min_score=MIN_SCORE, threshold=0.6, reference_threshold=0.5, keeper=("area",), max_group=max(100, count)
        ),
        roles={"pool": "pool", "test-set": "reference"},
    )
    sizes = np.bincount(component, weights=in_pool)
    details = {
        "threshold": 0.6, "reference_threshold": 0.5, "groups": int((sizes > 1).sum()), "largest_group": int(sizes.max()),
        "leaks": {"test-set": {"role": "reference", "dropped": len(of), "images": len(of)}}, "leaked_by_set": {"test-set": len(of)},
    }  # fmt: skip
    sets = ("pool", "test-set")
    inputs = {
        f"{role}:{name}": f"{stage}/{name}"
        for name in sets
        for role, stage in (("images", "ingest"), ("vectors", "embed"))
    }
    maker.put(
        "dedup/pool", {"duplicates": [duplicates], "edges": [edges], "leaks": [leaks]},
        Rows(len(rows), int(found.kept[rows].sum()), dropped), canonical(spec.identity()), {**inputs, "masked": "filter/pool"}, details,
        content={"kept": digest("kept", maker.seed)},
    )  # fmt: skip
    return [every[row] for row in rows[found.kept[rows]]]


def _clusters(
    maker: Maker, kept: list[str], pool: list[str], vectors: np.ndarray, rng: np.random.Generator, part: int
) -> None:
    k = max(8, min(1_000, len(kept) // 100))
    rows = {image_id: n for n, image_id in enumerate(pool)}
    at = np.array([rows[image_id] for image_id in kept])
    wide = vectors.astype(np.float32)
    centroids = wide[rng.choice(at, k, replace=False)]
    nearest = np.concatenate(
        [(wide[at[n : n + part]] @ centroids.T).argmax(axis=1) for n in range(0, len(at), part)]
    ).astype(np.int32)
    buffer = io.BytesIO()
    np.save(buffer, centroids)
    relative = f"parts/fit_clusters/{digest('fit_clusters', maker.seed)}/centroids.npy"
    with maker.store.writing(relative) as sink:
        sink.write(buffer.getvalue())
    file = File(relative, k, sink.size_bytes, sink.sha256())
    key = digest("fit_clusters", maker.seed)
    maker.store.commit_part("fit_clusters", key, {}, files={"centroids": file})
    fitted = {"k": k, "levels": [k], "mean_squared_distance": 0.5}
    maker.put(
        "fit_clusters/pool", {"centroids": [file]}, Rows(len(kept), len(kept)), {}, {"vectors": "embed/pool", "dedup": "dedup/pool"},
        fitted, content={"centroids": file.sha256},
    )  # fmt: skip
    path = pa.array(nearest.reshape(-1, 1).tolist(), pa.list_(pa.int32()))
    table = pa.table({"image_id": kept, "cluster": nearest, "path": path}, schema=records.CLUSTERS)
    sizes = np.bincount(nearest, minlength=k)
    maker.put(
        "cluster/pool", {"clusters": [table], "centroids": [file]}, Rows(len(kept), len(kept)), {},
        {"vectors": "embed/pool", "centroids": "fit_clusters/pool"},
        {"k": k, "largest": int(sizes.max()), "empty": int((sizes == 0).sum())},
    )  # fmt: skip


def _shards(maker: Maker, ids: Mapping[str, list[str]], kept: list[str], rng: np.random.Generator) -> None:
    chosen = [image_id for image_id, taken in zip(kept, rng.random(len(kept)) < 0.4, strict=True) if taken]
    count = len(chosen)
    queries = [ids["flowers"][n] for n in rng.integers(0, len(ids["flowers"]), count)]
    similarity = rng.uniform(0.2, 0.9, count).astype(np.float32)
    columns = {
        "image_id": chosen, "set": pa.repeat("flowers", count), "mode": pa.repeat("sample", count), "query_id": queries,
        "similarity": similarity, "cluster": pa.nulls(count, pa.int32()),
    }  # fmt: skip
    hits = pa.table(columns, schema=records.MATCHES)
    details = {"asked": count, "retrieved": count, "distinct": count}
    maker.put(
        "retrieve/flowers", {"matches": [hits]}, Rows(count, count), {"mode": "sample", "k": 4},
        {"queries": "embed/flowers", "vectors": "embed/pool"}, details,
    )  # fmt: skip
    maker.put(
        "retrieve/all", {"selected": [hits]}, Rows(count, count), {"sets": ["flowers"]}, {"retrieve:flowers": "retrieve/flowers"}, details
    )  # fmt: skip
    shard = [f"shard-{n // 1_000:06}.tar" for n in range(count)]
    offsets = np.arange(count, dtype=np.int64) % 1_000 * 2_048 + 512
    index = pa.table(
        {"image_id": chosen, "shard": shard, "offset": offsets, "size_bytes": np.full(count, 1_000)},
        schema=records.SHARDS,
    )
    folder = f"shards/x{maker.seed}"
    shards = sorted(set(shard))
    files = [File(f"{folder}/{name}", 1_000, 2_048_000, digest(name)) for name in shards]
    maker.put(
        "write_shards/all", {"index": [index], "shards": files}, Rows(count, count), {"name": "inspected", "limit": None},
        {"selected": "retrieve/all", "dedup": "dedup/pool"},
        {"folder": folder, "shards": len(shards), "shards_numbered": len(shards), "size_bytes": 2_048_000 * len(shards)},
    )  # fmt: skip


def inspected(folder: Path, images: int = 300, seed: int = 0, decided: int | None = None) -> tuple[Opened, Inspected]:
    """Such a store with pictures, and what pages read of its last run, made in this process."""
    opened = open_store(make(folder, images, pictures=True, seed=seed, part=100, decided=decided))
    with in_one_process():
        return opened, inspect(opened, lambda event: None)
