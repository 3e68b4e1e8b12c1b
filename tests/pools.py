"""A pool made by hand: a few images of known kinds in a folder, what ingest would say of them, and stages on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from builders import encoded, id_of, write_folder
from inline import artifact, ran
from PIL import Image, ImageFilter

from lodeset.pipeline import graph
from lodeset.pipeline.algorithms.images.decoding import examine
from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.tables import records

DETAIL, BLOCKS = (np.random.default_rng(0).integers(0, 128, (side, side, 3), dtype=np.uint8) for side in (64, 4))
NOISE = DETAIL + np.kron(BLOCKS, np.ones((16, 16, 1), np.uint8))  # fine detail that blur takes, blocks that it leaves


def noisy(red: int = 128, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Sharp, not blank, and as red as asked."""
    image = np.asarray(Image.fromarray(NOISE).resize(size, Image.Resampling.NEAREST)).copy()
    image[..., 0] = red
    return Image.fromarray(image)


def pictures() -> dict[str, bytes]:
    made = {
        "sharp": noisy(100),
        "red": noisy(250),
        "small": noisy(101, (40, 10)),
        "long": noisy(102, (20, 100)),
        "blank": Image.new("RGB", (50, 50), (90, 100, 110)),
        "blurred": noisy(103).filter(ImageFilter.GaussianBlur(4)),
    }
    return {name: encoded(image) for name, image in made.items()}


URLS = {
    "sharp": ["https://good.org/a.jpg", None, "data:,x"],
    "red": ["https://img.bad.com/x", "https://good.org/x"],
    "small": ["https://bad.com/private/x"],
    "long": [],
    "blank": ["not a url at all"],
    "blurred": ["https://good.org/private/x"],
}


@dataclass
class Pool:
    """A folder of images, and what ingest would say about it."""

    folder: Path
    store: Store
    names: dict[str, str]  # image_id -> name

    def config(self, **filter: Any) -> CurationConfig:
        return CurationConfig.model_validate(
            {"store": self.store.url, "pool": [str(self.folder / "pool")], "filter": filter}
        )

    def ingested(self, parts: int = 2, more: dict[str, bytes] | None = None, folder: str = "pool") -> Artifact:
        """`ingest` of the pool in so many parts, with `more` images, written to `folder`."""
        files = pictures() | (more or {})
        write_folder(self.folder / folder, [(f"{name}.png", data) for name, data in files.items()])
        self.names.update({id_of(data): name for name, data in files.items()})
        tables: dict[str, list[Any]] = {"images": [], "locations": [], "metadata": []}
        names = list(files)
        for part in range(parts):
            rows: dict[str, list[Any]] = {"images": [], "locations": [], "metadata": []}
            for name in names[part::parts]:
                data = files[name]
                found = examine(data)
                shown = {"set": "pool", "size_bytes": len(data), "derived_from": None}
                rows["images"].append({**vars(found), **shown})
                place = {"uri": str(self.folder / f"{folder}/{name}.png"), "member": "", "offset": 0}
                rows["locations"].append({**place, "set": "pool", "image_id": found.image_id, "size_bytes": len(data)})
                for n, url in enumerate(URLS.get(name, [])):
                    rows["metadata"].append({"image_id": found.image_id, "source": str(n), "url": url})
            schemas = {"images": records.IMAGES, "locations": records.LOCATIONS, "metadata": records.METADATA}
            made = {t: pa.Table.from_pylist(rows[t], schema=schema) for t, schema in schemas.items()}
            key = f"{folder}-{part}-of-{parts}-{len(files)}"
            for table, file in self.store.commit_part("ingest", key, made).files.items():
                tables[table].append(file)
        outcome = Outcome({t: tuple(found) for t, found in tables.items()}, Rows(len(files), len(files)))
        return artifact("ingest", "pool", outcome)

    def scored(self, config: CurationConfig, ingested: Artifact, previous: Artifact | None = None) -> Artifact:
        stage = graph.build(config)["score/pool"]
        outcome = stage.function(Context(self.store, stage, "f", {"images": ingested}, 1, lambda _: None, previous))
        made = artifact("score", "pool", outcome)
        return Artifact(**{**vars(made), "config": dict(stage.config)})

    def filtered(self, config: CurationConfig, ingested: Artifact | None = None) -> Artifact:
        ingested = ingested or self.ingested()
        stages = graph.build(config)
        known = {"ingest/pool": ingested}
        if "score/pool" in stages:
            known["score/pool"] = self.scored(config, ingested)
        return ran(self.store, stages["filter/pool"], known)

    def reasons(self, made: Artifact) -> dict[str, str]:
        table = self.store.table(made.tables["filtered"], ["image_id", "reason"], records.FILTERED)
        ids = table["image_id"].to_pylist()
        assert ids == sorted(set(ids)), "image_id is the primary key"
        found = {self.names[i]: reason for i, reason in zip(ids, table["reason"].to_pylist(), strict=True)}
        assert sum(made.rows.dropped.values()) == len(found)
        return found

    def scores(self, made: Artifact) -> dict[tuple[str, str], float]:
        rows = self.store.table(made.tables["scores"]).to_pylist()
        found = {(self.names[row["image_id"]], row["filter"]): row["score"] for row in rows}
        assert len(found) == len(rows), "image_id, filter is the primary key"
        return found
