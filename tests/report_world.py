"""A small finished run, made by hand without running a stage, so that every figure of its report is known."""

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from builders import dedup_spec
from PIL import Image

from lodeset.infra.report import collect
from lodeset.infra.report.contents import Report
from lodeset.infra.report.render import Collected, collected, write_report
from lodeset.infra.report.section import Finished
from lodeset.pipeline.algorithms.images.decoding import image_id
from lodeset.pipeline.dag.fingerprint import canonical
from lodeset.pipeline.dag.stage import Context, Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.tables import records

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)'
ORDER = (
    "ingest",
    "embed",
    "score",
    "filter",
    "calibrate",
    "dedup",
    "cluster",
    "retrieve",
    "write_shards",
    "train",
    "evaluate",
    "prune",
)
METHODS = ("entropic", "entropic+refit", "magnitude", "magnitude+refit", "random", "random+refit")


def never(context: Context) -> Outcome:
    raise AssertionError("a report runs no stage")


@dataclass
class World:
    """A store, its graph and artifacts, and the image_ids by file name."""

    store: Store
    sources: Path
    stages: dict[str, Stage]
    artifacts: dict[str, Artifact]
    ids: dict[str, str]
    tables_made: int = 0

    def add(
        self,
        stage: str,
        set_: str,
        tables: Mapping[str, Sequence[pa.Table | File]],
        rows: Rows,
        details: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        assert rows.balanced()
        files = {name: tuple(self._file(stage, name, t) for t in some) for name, some in tables.items()}
        self.stages[f"{stage}/{set_}"] = Stage(stage, set_, 1, "ray", never, config or {})
        self.artifacts[f"{stage}/{set_}"] = Artifact(
            stage,
            set_,
            1,
            f"{stage}-{set_}",
            config or {},
            {},
            files,
            rows,
            {},
            details or {},
            seconds=2.0,
            created=1.8e9,
        )

    def _file(self, stage: str, name: str, table: pa.Table | File) -> File:
        if isinstance(table, File):
            return table
        self.tables_made += 1
        return self.store.commit_part(stage, f"{name}-{self.tables_made}", {name: table}).files[name]

    def report(self) -> Report:
        return collect.collect(self.store, self.stages, self.artifacts)

    def sections(self) -> list[Collected]:
        report = self.report()
        return collected(Finished(store=self.store, stages=self.stages, artifacts=self.artifacts, report=report))

    def write(self, path: Path, title: str = "a run") -> str:
        return write_report(self.store, self.stages, self.artifacts, path, title).read_text(encoding="utf-8")


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def table(schema: pa.Schema, *rows: Sequence[Any]) -> pa.Table:
    """Rows of a table; columns that a row does not reach are null."""
    return pa.Table.from_pylist([dict(itertools.zip_longest(schema.names, row)) for row in rows], schema=schema)


def ingest(world: World, set_: str, parts: Sequence[Sequence[str]], owned: Sequence[Sequence[str]]) -> None:
    """Ingests files by name: each part's locations, and the images that it owns."""
    sizes = {name: (8, 8) if name.startswith("tiny") else (40, 30) for name in world.ids}

    def location(name: str) -> tuple[Any, ...]:
        file = world.sources / name
        return (set_, str(file), "", 0, world.ids[name], file.stat().st_size)

    def image(name: str) -> tuple[Any, ...]:
        return (world.ids[name], set_, *sizes[name], "JPEG", 1, 0, b"", None)

    rejects = table(records.REJECTS, *((set_, f"/somewhere/{HOSTILE}", "", 0, 12, "corrupt", f"detail {HOSTILE}"),) * 7)
    taken, kept = sum(map(len, parts)) + 7, sum(map(len, owned))
    twice = taken - 7 - kept
    world.add(
        "ingest",
        set_,
        {
            "locations": [table(records.LOCATIONS, *map(location, names)) for names in parts],
            "images": [table(records.IMAGES, *map(image, names)) for names in owned],
            "rejects": [rejects],
        },
        Rows(taken, kept, {"corrupt": 7, **({"exact_duplicate": twice} if twice else {})}),
        config={"max_pixels": 10_000},
    )


def make_world(folder: Path) -> World:
    """20 pool images: copy-of-0 is a copy of 00, leak of ref, chained is linked to 01 by others only."""
    sources = folder / "sources"
    sources.mkdir()
    names = [
        *(f"{n:02}.jpg" for n in range(14)),
        "copy-of-0.jpg",
        "leak.jpg",
        "chained.jpg",
        "by-hash.jpg",
        "tiny.jpg",
        "again.jpg",
    ]
    ids = {}
    for seed, name in enumerate([*names, "ref.jpg", "query.jpg"]):
        data = jpeg(1 if name == "again.jpg" else seed, *((8, 8) if name == "tiny.jpg" else (40, 30)))
        (sources / name).write_bytes(data)
        ids[name] = image_id(data)
    world = World(Store(str(folder / "store")), sources, {}, {}, ids)
    ingest(world, "pool", [names[:10], names[10:]], [names[:10], names[10:-1]])
    ingest(world, "test-set", [["ref.jpg"]], [["ref.jpg"]])
    ingest(world, "flowers", [["query.jpg"]], [["query.jpg"]])
    with_vector = pa.table(
        {"image_id": [i for n, i in ids.items() if n not in ("09.jpg", "again.jpg", "ref.jpg", "query.jpg")]}
    )
    world.add("embed", "pool", {"vectors": [with_vector]}, Rows(19, 18, {"not_finite": 1}))
    # The last one, tiny.jpg, has a score above the threshold, too; its reason is the filter that comes first.
    scores = table(records.SCORES, *((ids[n], "nsfw", k / 20 + 0.01) for k, n in enumerate(names[:19])))
    world.add("score", "pool", {"scores": [scores]}, Rows(19, 19), config={"scorers": {"nsfw": {}}})
    filtered = table(records.FILTERED, (ids["tiny.jpg"], "min_side", 8.0, 16.0))
    judging = {"min_side": 16, "classifiers": {"nsfw": {"keep": "below", "threshold": 0.88, "place": 0}}}
    world.add("filter", "pool", {"filtered": [filtered]}, Rows(19, 18, {"min_side": 1}), config=judging)
    _curate(world)
    _train(world)
    return world


def _curate(world: World) -> None:
    ids = world.ids
    samples = [("i", "jpeg", n / 100) for n in range(101)] + [("i", "stranger", 0.25)]
    schema = pa.schema([("image_id", pa.string()), ("kind", pa.string()), ("similarity", pa.float32())])
    calibrated = {"candidates": {"pool": 0.6, "reference": 0.5}, "median_similarity": {"jpeg": 0.5, "stranger": 0.25}}
    world.add("calibrate", "pool", {"samples": [table(schema, *samples)]}, Rows(19, 10, {"not_sampled": 9}), calibrated)

    duplicates: list[tuple[Any, ...]] = [
        (ids[f"{n:02}.jpg"], ids[f"{n:02}.jpg"], True, "unique", None, None) for n in range(9)
    ]
    duplicates += [
        (ids["copy-of-0.jpg"], ids["00.jpg"], False, "near", ids["00.jpg"], 0.8),
        (ids["by-hash.jpg"], ids["00.jpg"], False, "near", ids["00.jpg"], None),
        (ids["chained.jpg"], ids["01.jpg"], False, "near", ids["01.jpg"], None),
        (ids["leak.jpg"], ids["ref.jpg"], False, "reference", ids["ref.jpg"], 0.9),
    ]

    def edge(one: str, other: str, *told: Any) -> tuple[Any, ...]:
        return (*sorted((ids[one], ids[other])), *told)

    edges = table(
        records.EDGES,
        edge("copy-of-0.jpg", "00.jpg", 0.8, 3, True, "mirror"),
        edge("by-hash.jpg", "00.jpg", None, 1, True, "identity"),
        edge("chained.jpg", "01.jpg", 0.7, 9, False, "identity"),
        edge("leak.jpg", "ref.jpg", 0.9, 2, True, "identity"),
    )
    config = canonical(dedup_spec(reference_threshold=0.45, min_score=3.0, keeper=("area",)))
    found = {
        "threshold": 0.61,
        "reference_threshold": 0.45,
        "groups": 2,
        "largest_group": 3,
        "leaked_by_set": {"test-set": 1},
        "leaks": {"test-set": {"role": "reference", "dropped": 1, "images": 1}},
    }
    leaks = table(records.LEAKS, ("test-set", ids["ref.jpg"], ids["leak.jpg"], 0.9, True))
    tables = {"duplicates": [table(records.DUPLICATES, *duplicates)], "edges": [edges], "leaks": [leaks]}
    world.add("dedup", "pool", tables, Rows(13, 9, {"near": 3, "reference": 1}), found, config)

    clusters = [
        table(records.CLUSTERS, *((ids[f"{n:02}.jpg"], 2 * (n % 2), [0]) for n in some))
        for some in (range(5), range(5, 9))
    ]
    world.add("cluster", "pool", {"clusters": clusters}, Rows(9, 9), {"k": 3, "largest": 5, "empty": 1})
    matches = table(
        records.MATCHES, *((ids[f"{n:02}.jpg"], "flowers", "sample", ids["query.jpg"], n / 10, None) for n in range(9))
    )
    world.add(
        "retrieve",
        "flowers",
        {"matches": [matches]},
        Rows(9, 8, {"collision": 1}),
        {"asked": 10, "retrieved": 9, "distinct": 8, "collisions": 1, "short": 1, "capped": 0},
        {"mode": "sample", "k": 9},
    )
    world.add(
        "retrieve", "all", {"selected": []}, Rows(8, 8), {"distinct": 8, "shared": 3, "shared_by_set": {"flowers": 3}}
    )
    shards = [File(f"shards/x/shard-{n:06}.tar", 1, 2048, f"{n:064}") for n in range(23)]
    world.add(
        "write_shards",
        "all",
        {"shards": shards},
        Rows(8, 8),
        {
            "folder": "shards/x",
            "shards": 23,
            "shards_numbered": 23,
            "size_bytes": 23 * 2048,
            "dead_bytes": 3_072,
            "since": {"folder": "shards/w", "added": {"flowers sample": 2}, "removed": {"near": 1, "gone": 4}},
        },
    )


def _train(world: World) -> None:
    with world.store.writing("training/x/metrics.jsonl") as sink:
        for step in range(1, 1001):
            sink.write(
                f'{{"step": {step}, "loss": {10 / step}, "dino": {9 / step}, "ibot": {1 / step}, "lr": 0.1}}\n'.encode()
            )
    summary = {
        "steps": 1000,
        "images": 8,
        "images_seen": 32_000,
        "skipped": 2,
        "workers": 2,
        "resumed_step": 0,
        "seconds": 7.0,
    }
    metrics = File("training/x/metrics.jsonl", 0, 1, "")
    for stage in ("train", "finish"):
        world.add(
            stage,
            "all",
            {"metrics": [metrics]},
            Rows(8, 8),
            {**summary, "images_per_s": 4571.4, "folder": f"training/{stage}"},
        )
    pictures = table(records.PICTURES, ("birds", "0" * 32, "finished", b"\x89PNG image", b"\x89PNG picture"))
    linear = {
        name: {"accuracy": accuracy, "features": "cls + patches", "lr": 0.002}
        for name, accuracy in (("trained", 0.75), ("untrained", 0.375), ("embedder", 0.875))
    }
    knn = {
        "trained": {"10": 0.5, "100": 0.625},
        "untrained": {"10": 0.25, "100": 0.3},
        "embedder": {"10": 0.75, "100": 0.8},
    }
    world.add(
        "evaluate",
        "all",
        {"pictures": [pictures]},
        Rows(8, 8),
        {"targets": {"birds": {"knn": knn, "linear": linear, "gallery": 6, "test": 2, "classes": 4}}},
    )
    latency = {f"batch_{b}": {"median": 1.5, "spread": 0.5} for b in (1, 32)}
    dense = {"parameters": 1000, "nonzero": 990, "macs": 5_000_000, "channels": 64, "latency_ms": latency, "threads": 1}
    variants = [
        {
            "method": method, "eps_w": eps, "parameters": 800, "nonzero": 800, "macs": 4_000_000, "channels": 32,
            "latency_ms": latency, "threads": 1, "parameters_removed": 0.2 + eps, "macs_removed": 0.2, "channels_removed": 0.5,
            "density": 0.8, "units": {"mlp": 32}, "unexplained": {"mlp": 0.125}, "converged": method != "random",
            "dense": dense, "knn": {"birds": {"10": 0.4, "100": 0.5}}, "removal_difference": 1e-7, "model": "m", "seconds": 1.0,
        }
        for eps in (0.01, 0.1) for method in METHODS
    ]  # fmt: skip
    job = {
        "job": {"method": "entropic"}, "calibration_images": 8, "skipped_modules": {"blocks.0.attn": "attention: left whole"},
        "knn_dense": {"birds": {"10": 0.5, "100": 0.625}}, "variants": variants, "seconds": 3.0,
    }  # fmt: skip
    world.add("prune", "all", {}, Rows(1, 1), {"jobs": [job], "folder": "pruned/x"})
