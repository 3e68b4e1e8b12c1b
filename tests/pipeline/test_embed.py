"""The embed stage: one pass over the bytes, parts of its own for each embedder. Run in this process, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import inline
import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import id_of, picture

from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.dag.stage import Context, Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.embedders.config import TorchScriptEmbedder
from lodeset.pipeline.engines.ray import Pool, pool_for
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.graph import build
from lodeset.pipeline.stages import embed
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.vectors import read_vectors

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Channels(torch.nn.Module):
    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image.mean(dim=(2, 3)), image.abs().pow(self.power).mean(dim=(2, 3))], dim=1)


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A pool of 10 images in two ingest parts, and two networks."""
    knobs: dict[str, Any] = {}
    (tmp_path / "pool").mkdir()
    for n in range(10):
        (tmp_path / f"pool/{n}.png").write_bytes(picture(n, width=20 + n, height=24))
    for name, power, batch in (("semantic", 2.0, 3), ("dedup", 3.0, 4)):
        torch.jit.save(torch.jit.script(Channels(power)), tmp_path / f"{name}.pt")
        knobs[name] = {"kind": "torchscript", "path": str(tmp_path / f"{name}.pt"), "size": 16, "batch": batch}
    return {"store": str(tmp_path / "store"), "pool": [{"uri": str(tmp_path / "pool")}], "embed": knobs}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of the bytes that were decoded since it was last cleared."""
    inline.without_engine(embed, monkeypatch)
    sizes: list[int] = []
    decode = embed.decode

    def counted(data: bytes, max_pixels: int) -> Any:
        sizes.append(len(data))
        return decode(data, max_pixels)

    monkeypatch.setattr(embed, "decode", counted)
    yield sizes


def ingested(store: Store, folder: Path, count: int = 10) -> Artifact:
    parts = []
    for first in range(0, count, 5):
        images, places = [], []
        for n in range(first, min(count, first + 5)):
            data = (folder / f"{n}.png").read_bytes()
            images.append({"image_id": id_of(data), "set": "pool", "size_bytes": len(data)})
            place = {"set": "pool", "uri": str(folder / f"{n}.png"), "member": "", "offset": 0}
            places.append({**place, "image_id": id_of(data), "size_bytes": len(data)})
        tables = {
            "images": pa.Table.from_pylist(images, schema=records.IMAGES),
            "locations": pa.Table.from_pylist(places, schema=records.LOCATIONS),
        }
        parts.append(store.commit_part("ingest", f"{first}-{len(images)}", tables).files)
    outcome = Outcome({name: tuple(p[name] for p in parts) for name in ("images", "locations")}, Rows(count, count))
    return inline.artifact("ingest", "pool", outcome)


def context(store: Store, stage: Stage, images: Artifact, *also: Context, previous: Artifact | None = None) -> Context:
    return Context(store, stage, stage.name, {"images": images}, 1, lambda _: None, previous=previous, also=also)


def stages(tree: Mapping[str, Any]) -> tuple[Stage, Stage]:
    graph = build(CurationConfig.model_validate(tree))
    return graph["embed/pool"], graph["embed_dedup/pool"]


def vectors(store: Store, outcome: Outcome) -> tuple[list[str], np.ndarray]:
    return read_vectors(store, outcome.tables["vectors"])


def test_two_embedders_read_and_decode_each_image_once(
    tree: dict[str, Any], tmp_path: Path, decoded: list[int]
) -> None:
    semantic, dedup = stages(tree)
    assert semantic.also == (dedup.id,) and dedup.also == ()
    store = Store(tree["store"])
    images = ingested(store, tmp_path / "pool")
    first = embed.run(context(store, semantic, images, context(store, dedup, images)))
    assert len(decoded) == 10 and first.details["parts_made_beside"] == 2
    second = embed.run(context(store, dedup, images))
    assert len(decoded) == 10 and second.details["parts_made"] == 0
    assert first.rows == second.rows == Rows(10, 10)

    decoded.clear()
    alone = Store(str(tmp_path / "alone"))
    images = ingested(alone, tmp_path / "pool")
    for stage, together in ((semantic, first), (dedup, second)):
        ids, found = vectors(alone, embed.run(context(alone, stage, images)))
        np.testing.assert_array_equal(found, vectors(store, together)[1])
        assert ids == vectors(store, together)[0]
    assert len(decoded) == 20


def test_an_embedder_that_is_added_later_runs_alone(tree: dict[str, Any], tmp_path: Path, decoded: list[int]) -> None:
    graph = build(CurationConfig.model_validate({**tree, "embed": {"semantic": tree["embed"]["semantic"]}}))
    store = Store(tree["store"])
    images = ingested(store, tmp_path / "pool")
    embed.run(context(store, graph["embed/pool"], images))
    semantic, dedup = stages(tree)
    assert semantic.config == graph["embed/pool"].config  # so the runner finds it finished
    decoded.clear()
    assert embed.run(context(store, dedup, images)).details["images_embedded"] == 10
    assert len(decoded) == 10


def test_a_grown_part_decodes_what_is_new_for_either_embedder(
    tree: dict[str, Any], tmp_path: Path, decoded: list[int]
) -> None:
    semantic, dedup = stages(tree)
    store = Store(tree["store"])
    seven = ingested(store, tmp_path / "pool", 7)
    both = {}
    for stage in (semantic, dedup):
        outcome = embed.run(context(store, stage, seven))
        both[stage.name] = replace(inline.artifact(stage.name, "pool", outcome), config=_canonical(stage))
    decoded.clear()
    ten = ingested(store, tmp_path / "pool")
    guest = context(store, dedup, ten, previous=both["embed_dedup"])
    outcome = embed.run(context(store, semantic, ten, guest, previous=both["embed"]))
    assert len(decoded) == 3 and outcome.details["images_embedded"] == 3
    decoded.clear()
    second = embed.run(guest)
    assert not decoded and second.rows.kept == 10
    assert set(vectors(store, second)[0]) == set(vectors(store, outcome)[0])


def _canonical(stage: Stage) -> Any:
    from lodeset.pipeline.dag.fingerprint import canonical

    return canonical(stage.config)


def test_one_pass_needs_two_embedders_that_read_images(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["embed"]["semantic"] = {"kind": "patch_dictionary"}
    assert stages(tree)[0].also == ("embed_dedup/pool",)
    (tmp_path / "vectors.parquet").write_bytes(b"")
    tree["embed"]["semantic"] = {"kind": "precomputed", "path": str(tmp_path / "vectors.parquet")}
    assert stages(tree)[0].also == ()


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_decode_ahead_and_keep_the_order(
    tree: dict[str, Any], tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    semantic, _ = stages(tree)
    store, other = Store(tree["store"]), Store(str(tmp_path / "other"))
    one = embed.run(context(store, semantic, ingested(store, tmp_path / "pool")))
    monkeypatch.setattr(embed, "cores", lambda: threads)
    monkeypatch.setattr(embed, "_AHEAD", 1)
    many = embed.run(context(other, semantic, ingested(other, tmp_path / "pool")))
    assert len(decoded) == 20
    for found, expected in zip(vectors(other, many), vectors(store, one), strict=True):
        np.testing.assert_array_equal(found, expected)


class Odd(torch.nn.Module):
    """Not a number for every image, or vectors as wide as the batch is long."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if self.how == "nan":
            return image.mean(dim=(2, 3)) * float("nan")
        return torch.ones(image.shape[0], image.shape[0])


@pytest.mark.parametrize(
    ("how", "batch", "told"),
    [
        ("nan", 5, r"odd\.pt gave no finite vector for any of 7 images.*fp32"),
        ("widths", 3, r"odd\.pt gives vectors of widths \[2, 3\]"),  # batches of 3 and 2 in one part
        ("widths", 5, r"odd\.pt gave vectors of widths \[2, 5\]"),  # one batch a part
    ],
)
def test_a_network_that_gives_no_usable_vectors(
    tree: dict[str, Any], tmp_path: Path, decoded: list[int], how: str, batch: int, told: str
) -> None:
    path = str(tmp_path / "odd.pt")
    torch.jit.save(torch.jit.script(Odd(how)), path)
    odd = TorchScriptEmbedder(kind="torchscript", path=path, size=16, batch=batch)
    semantic, _ = stages({**tree, "embed": {**tree["embed"], "semantic": odd.model_dump()}})
    store = Store(tree["store"])
    with pytest.raises(LodesetError, match=told):
        embed.run(context(store, semantic, ingested(store, tmp_path / "pool", 7)))


# -- which workers there are

GPU_NODE = {"CPU": 16.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("items", "cpus", "nodes", "expected"),
    [
        (100, 8, [{"CPU": 8.0}], Pool(8, 1, 0)),
        (3, 8, [{"CPU": 8.0}], Pool(3, 1, 0)),
        (100, 16, [GPU_NODE], Pool(2, 8, 1)),
        (1, 16, [GPU_NODE], Pool(1, 8, 1)),  # the other GPU's cores are left to what runs beside it
        (100, 64, [GPU_NODE, {"CPU": 48.0}], Pool(2, 8, 1)),  # no more cores than the GPU's own node has
        (100, 20, [GPU_NODE, {"CPU": 4.0, "GPU": 4.0}], Pool(6, 1, 1)),
        (100, 2, [{"CPU": 2.0, "GPU": 8.0}], Pool(2, 1, 1)),  # a worker needs a core
        (100, 4, [{"CPU": 0.0, "GPU": 1.0}, {"CPU": 4.0}], Pool(4, 1, 0)),
    ],
)
def test_one_worker_a_gpu(items: int, cpus: int, nodes: list[dict[str, float]], expected: Pool) -> None:
    assert pool_for(items, cpus, nodes) == expected


@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_workers_with_gpus_fit_their_nodes(gpus: int) -> None:
    """However cores and parts are counted, Ray can place every worker: none waits for ever."""
    for cores in (1, 2, 7, 64):
        for items in (1, 5, 50):
            for cpus in (1, 4, 64):
                pool = pool_for(items, cpus, [{"CPU": float(cores), "GPU": float(gpus)}])
                assert 1 <= pool.actors <= min(items, cpus, gpus, cores)
                assert pool.actors * pool.cpus_each <= max(cores, cpus)
                assert pool.actors * pool.cpus_each <= cores and pool.gpus_each == 1
