"""One image's way through the DAG, from the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables.records import BY_NAME, LARGE

# Maximum number of rows of a table that are shown for one image (exact copies of a popular image can have thousands of
# locations).
MOST_ROWS = 20
BLURRED = "blurred_"
IMAGES, LOCATIONS = ("images", "blurred_images"), ("locations", "blurred_locations")


def trace(store: Store, artifacts: Mapping[str, Artifact], image_id: str) -> list[dict[str, Any]]:
    """What each stage knows about an image, in the order of the DAG.

    Raises:
        LodesetError: no set of this run contains it.
    """
    steps: list[dict[str, Any]] = []
    for id_, artifact in artifacts.items():
        of_stage: list[dict[str, Any]] = []
        for table, files in artifact.tables.items():
            known = BY_NAME.get(table)
            if known is None or known.inner:
                continue
            # Derived images are listed by `faces`; a row of `matches` also concerns its query.
            about = (
                ("image_id",) if table in IMAGES else (*known.about, *(c for c in known.mentions if c == "query_id"))
            )
            rows = rows_about(store, files, image_id, about)
            if table == "edges":
                # An image has many candidates; the most informative ones are those that were verified, then the most
                # similar.
                rows.sort(key=lambda row: (not row["verified"], -(row["similarity"] or 0.0)))
            of_stage += [
                {"stage": id_, "table": table, **{k: v for k, v in row.items() if v is not None}}
                for row in rows[:MOST_ROWS]
            ]
        # The pool that blur_faces makes lists its blurred images again.
        again = {step["table"].removeprefix(BLURRED) for step in of_stage if step["table"].startswith(BLURRED)}
        steps += [step for step in of_stage if step["table"] not in again]
    if not any(step["table"] in IMAGES for step in steps):
        raise LodesetError(
            f"no image {image_id} in this run's sets: was it rejected? `lodeset status` counts the rejects by reason, "
            "and `lodeset table CONFIG rejects` lists them"
        )
    return steps


def rows_about(store: Store, files: Sequence[File], image_id: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of any table that hold an image_id in one of these columns."""
    rows: list[dict[str, Any]] = []
    for file in files:
        columns = columns_of(store, file)
        about = [name for name in names if name in columns]
        if not about or not file.rows:
            continue
        data = store.table([file], [name for name in columns if name not in LARGE])
        hit: pa.ChunkedArray = pc.equal(data[about[0]], image_id)
        for column in about[1:]:
            hit = pc.or_kleene(hit, pc.equal(data[column], image_id))
        rows += data.filter(hit).to_pylist()
    return rows


def columns_of(store: Store, file: File) -> list[str]:
    """The columns of a table's file; none if it is not a Parquet file."""
    if not file.path.endswith(".parquet"):
        return []
    with store.opened(file) as source:
        return list(pq.read_schema(source).names)
