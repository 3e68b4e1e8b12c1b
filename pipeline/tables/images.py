"""Which images an ingest part holds, and where their bytes lie."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lodeset.pipeline.dag.store import File, Store


def image_ids(store: Store, images: File) -> list[str]:
    """The images of an ingest part, in its order."""
    return list(store.table([images], ["image_id"]).column(0).to_pylist())


def places_of(store: Store, images: File, locations: File) -> pa.Table:
    """One location for each image of an ingest part (its first), in the order of the bytes."""
    owned = store.table([images], ["image_id"])["image_id"]
    table = store.table([locations])
    table = table.filter(pc.is_in(table["image_id"], owned.combine_chunks()))
    first = (
        table.append_column("row", pa.array(np.arange(table.num_rows))).group_by("image_id").aggregate([("row", "min")])
    )
    return table.take(np.sort(first["row_min"].to_numpy()))
