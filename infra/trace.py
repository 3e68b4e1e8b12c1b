"""One image's way through the DAG, from the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.algorithms.images import ID_HEX_DIGITS
from pipeline.dag.store import Artifact, Store
from pipeline.errors import ConfigError, LodesetError


def trace(store: Store, artifacts: Mapping[str, Artifact], image_id: str) -> list[dict[str, Any]]:
    """What each stage knows of an image, in the order of the DAG.

    Raises:
        ConfigError: not an image_id.
        LodesetError: no set of this configuration holds it.
    """
    image_id = image_id.lower()
    if len(image_id) != ID_HEX_DIGITS or any(c not in "0123456789abcdef" for c in image_id):
        raise ConfigError(
            f"{image_id!r} is not an image_id: {ID_HEX_DIGITS} hex digits, the start of the SHA-256 of the file's bytes"
        )
    steps: list[dict[str, Any]] = []
    for id_, artifact in artifacts.items():
        for table, columns in _TABLES.get(artifact.stage, ()):
            found = _rows(store, artifact, table, columns, image_id)
            if table == "edges":
                # An image has many candidates; those that say most about it are the verified ones, then the most similar.
                found.sort(key=lambda row: (not row["verified"], -(row["similarity"] or 0.0)))
            for row in found[:MOST_ROWS]:
                steps.append(
                    {
                        "stage": id_,
                        "table": table,
                        **{k: v for k, v in row.items() if v is not None and k not in _LARGE},
                    }
                )
    if not any(step["table"] in ("images", "blurred_images") for step in steps):
        raise LodesetError(
            f"no image {image_id} in this configuration's sets: was it rejected? `lodeset status` counts the rejects by "
            "reason, and the tables `rejects` of `lodeset status --json` name each"
        )
    return steps


# Rows of one table that are told of one image (exact copies of a popular image can lie in thousands of places).
MOST_ROWS = 20
_LARGE = ("thumbnail", "vector")
# Stage -> (table, columns in which an image_id may stand).
_TABLES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "ingest": (("images", ("image_id",)), ("locations", ("image_id",)), ("metadata", ("image_id",))),
    "blur_faces": (
        ("faces", ("image_id", "derived_from")),
        ("blurred_images", ("image_id",)),
        ("blurred_locations", ("image_id",)),
    ),
    "embed": (("vectors", ("image_id",)),),
    "embed_dedup": (("vectors", ("image_id",)),),
    "score": (("scores", ("image_id",)),),
    "filter": (("filtered", ("image_id",)),),
    "dedup": (
        ("duplicates", ("image_id",)),
        ("leaks", ("pool_image_id", "image_id")),
        ("edges", ("image_id_a", "image_id_b")),
    ),
    "cluster": (("clusters", ("image_id",)),),
    "balance": (("matches", ("image_id",)),),
    "retrieve": (("matches", ("image_id", "query_id")), ("selected", ("image_id", "query_id"))),
    "write_shards": (("index", ("image_id",)),),
}


def _rows(
    store: Store, artifact: Artifact, table: str, columns: tuple[str, ...], image_id: str
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for file in artifact.tables.get(table, ()):
        if not file.rows:
            continue
        data: pa.Table = store.table([file])
        hit = pc.equal(data[columns[0]], image_id)
        for column in columns[1:]:
            hit = pc.or_kleene(hit, pc.equal(data[column], image_id))
        rows += data.filter(hit).drop_columns([c for c in _LARGE if c in data.column_names]).to_pylist()
    return rows
