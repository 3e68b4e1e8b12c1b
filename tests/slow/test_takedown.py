"""An image is planted in every set and table of a store, and forgotten: nothing in the store says that it was ever there."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from builders import encoded, id_of, textured, write_folder, write_tar
from inline import in_one_process
from onnx_files import write_detector
from PIL import Image

import lodeset
from lodeset.infra.upkeep.forget import forget
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.tables import records

pytestmark = pytest.mark.slow  # a whole run

COUNT = 40
URL = "https://planted.example/secret-name.jpg"
CAPTION = "a caption of the planted image alone"


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    return encoded(image, "JPEG", quality=quality)


PLANTED = jpeg(textured(7))
SAID = {"url": URL, "caption": CAPTION}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run of every stage of curation and a short training. The planted image lies in the pool (twice, and as near-duplicates that
    are smaller or larger than it), in a curated set that is included, in a reference set of another pool image, and in a target set.
    """
    folder = tmp_path_factory.mktemp("takedown")
    smaller = jpeg(textured(7).resize((120, 96), Image.Resampling.LANCZOS), 80)
    pool = [(f"{n:02}.jpg", jpeg(textured(n))) for n in range(COUNT)]
    members = [(f"{n:02}.{kind}", data) for n, (_, image) in enumerate(pool) for kind, data in (
        ("jpg", image), ("json", json.dumps(SAID if n == 7 else {"url": f"https://other.example/{n}"}).encode()))]  # fmt: skip
    write_tar(folder / "pool/a.tar", members)
    write_folder(
        folder / "pool/loose", [("again.jpg", PLANTED), ("smaller.jpg", smaller), ("other.jpg", jpeg(textured(90)))]
    )
    write_folder(folder / "curated", [(f"{n}.jpg", jpeg(textured(60 + n))) for n in range(3)] + [("p.jpg", PLANTED)])
    write_folder(folder / "reference", [("r.jpg", jpeg(textured(3), 85))])
    rows = [
        (PLANTED, "cat", "gallery", URL),
        *((jpeg(textured(70 + n)), "dog", ("gallery", "test")[n % 2], "") for n in range(5)),
    ]
    table = {
        name: list(column)
        for name, column in zip(("image", "label", "split", "url"), zip(*rows, strict=True), strict=True)
    }
    pq.write_table(pa.table(table), folder / "target.parquet")
    write_detector(folder / "faces.onnx", 16, [(0.25, 0.25, 0.75, 0.5)], [10.0])
    config = {
        "store": "./store",
        "pool": ["pool/a.tar", "pool/loose/"],
        "curated": [{"name": "wanted", "uri": "curated/", "include": True, "retrieve": {"mode": "sample", "k": 6}}],
        "reference": [{"name": "held", "uri": "reference/"}],
        "targets": [{"name": "target", "uri": "target.parquet", "label": "label", "split": "split"}],
        "ingest": {"slice_mb": 0.05, "limit": 38},
        "filter": {"min_sharpness": 0.0001, "blank": True, "min_side": 20, "faces": {"path": "faces.onnx", "mean": [0, 0, 0], "std": [1, 1, 1]}},
        "cluster": {"k": 3},
        "embed": {"semantic": {"kind": "patch_dictionary", "words": 16}},
        "dedup": {"calibration_images": 20},
        "balance": {"images": 20},
        "training": {"recipe": "tiny", "steps": 2, "batch": 8, "model": {"dim": 32, "depth": 1, "heads": 2},
                     "heads": {"prototypes": 16}, "crops": {"global_size": 32, "local_size": 16}},
    }  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    project = lodeset.load(folder / "c.yaml")
    with in_one_process():  # what engines do is for others to test
        project.run(watch=lambda event: None, until="write_shards")
    project.run(watch=lambda event: None)
    # Grown, so that shards, generations and thresholds of two runs lie beside each other.
    write_folder(folder / "pool/loose", [(f"new{n}.jpg", jpeg(textured(100 + n))) for n in range(4)])
    grown = lodeset.load(folder / "c.yaml", overrides=["ingest.limit=42"])
    with in_one_process():
        grown.run(watch=lambda event: None, until="write_shards")
    return Store(str(folder / "store"))


def tables(store: Store) -> Iterator[tuple[str, str, pa.Table]]:
    """Every table that a manifest lists: its name, its path and its rows."""
    seen = set()
    for manifest in Path(store.root).rglob("manifest.json"):
        tree = json.loads(manifest.read_text())
        listed = [*tree.get("files", {}).items()] if isinstance(tree.get("files"), dict) else []
        listed += [(name, file) for name, files in tree.get("tables", {}).items() for file in files]
        for name, file in listed:
            path = file.get("path", "") if isinstance(file, dict) else ""
            if path.endswith(".parquet") and (name, path) not in seen and (Path(store.root) / path).exists():
                seen.add((name, path))
                yield name, path, pq.read_table(Path(store.root) / path)


def texts(column: pa.ChunkedArray) -> Iterator[Any]:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        if pa.types.is_string(kind.value_type) or pa.types.is_binary(kind.value_type):
            yield from (one for row in column.to_pylist() if row for one in row)
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        yield from (one for one in column.to_pylist() if one is not None)


def test_take_down_knows_every_column_that_holds_an_image_id(store: Store) -> None:
    ids = {i for name, _, table in tables(store) if name == "images" for i in table["image_id"].to_pylist()}
    raw = {bytes.fromhex(i) for i in ids}
    found: dict[str, set[str]] = {}
    for name, _, table in tables(store):
        for column in table.column_names:
            if any(one in ids or one in raw for one in texts(table[column])):
                found.setdefault(name, set()).add(column)
    unknown = {
        name: columns - set(records.BY_NAME[name].naming if name in records.BY_NAME else ())
        for name, columns in found.items()
    }
    assert not {name: columns for name, columns in unknown.items() if columns}
    assert {"images", "vectors", "scores", "edges", "duplicates", "leaks", "clusters", "matches", "selected", "index", "features",
            "pictures", "faces", "generations", "measured", "samples", "copies"} <= set(found)  # fmt: skip


def traces(store: Store, planted: list[bytes]) -> list[str]:
    """Where in a store one of these is to be found; tables are read, because their bytes are compressed."""
    found = []
    for path in Path(store.root).rglob("*"):
        if not path.is_file():
            continue
        relative = path.relative_to(store.root).as_posix()
        data = path.read_bytes()
        if path.suffix == ".parquet":
            sink = io.BytesIO()
            pq.write_table(pq.read_table(path), sink, compression="none", use_dictionary=False)
            data += sink.getvalue()
        found += [f"{relative} holds {one[:40]!r}" for one in planted if one in data or one in relative.encode()]
    return found


def test_nothing_is_left_of_an_image_that_was_forgotten(store: Store) -> None:
    image_id, middle = id_of(PLANTED), len(PLANTED) // 2
    faces = [row for name, _, table in tables(store) if name == "faces" for row in table.to_pylist()]
    blurred = {row["image_id"] for row in faces if row["derived_from"] == image_id}
    assert blurred
    planted = [PLANTED[middle : middle + 40], URL.encode(), CAPTION.encode()]
    planted += [form for one in (image_id, *blurred) for form in (one.encode(), bytes.fromhex(one))]
    before = traces(store, planted)
    assert len(before) > 20, before
    forget(store, [URL], with_copies=False)
    left = [place for place in traces(store, planted) if not place.startswith("forgotten/")]
    assert not left
    assert URL not in (Path(store.root) / f"forgotten/{image_id}.json").read_text()
