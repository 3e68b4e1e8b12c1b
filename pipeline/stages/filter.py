"""filter (Ray): `images` -> `filtered`, the images that are masked out before dedup, each with its reason."""

from __future__ import annotations

import functools
import time

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import records
from pipeline.config import Filter
from pipeline.dag.fingerprint import digest
from pipeline.dag.stage import Context, Outcome
from pipeline.dag.store import File, Part, Rows, Store
from pipeline.engines.ray import map_items
from pipeline.stages.parts import made

VERSION = 1
STAGE = "filter"


def run(context: Context) -> Outcome:
    config: Filter = context.speed["filter"]
    images = context.inputs["images"].tables["images"]
    work = [
        (key, (key, file), file.rows) for file in images if (key := digest(STAGE, VERSION, file.sha256, context.config))
    ]
    make = functools.partial(_filter_part, context.store, config)
    parts, new = made(
        context, STAGE, work, functools.partial(map_items, make, cpus=context.cpus, address=context.ray_address)
    )
    files = tuple(p.files["filtered"] for p in parts if p.files["filtered"].rows)
    counted = pc.value_counts(context.store.table(files, ["reason"], records.FILTERED)["reason"]).to_pylist()
    dropped = {r["values"]: r["counts"] for r in sorted(counted, key=lambda r: r["values"])}
    taken = sum(f.rows for f in images)
    return Outcome(
        tables={"filtered": files},
        rows=Rows(taken=taken, kept=taken - sum(dropped.values()), dropped=dropped),
        details={"parts": len(parts), "parts_made": len(new)},
    )


def _filter_part(store: Store, config: Filter, item: tuple[str, File]) -> Part:
    key, file = item
    started = time.time()
    table = store.table([file], ["image_id", "width", "height"])
    return store.commit_part(
        STAGE, key, {"filtered": masked(table, config)}, {"images": file.rows}, time.time() - started
    )


def masked(images: pa.Table, config: Filter) -> pa.Table:
    """`filtered` rows of the images that fail a test; the first test that fails is the reason."""
    small = pc.less(pc.min_element_wise(images["width"], images["height"]), config.min_side)
    ids = images["image_id"].filter(small)
    return pa.table(
        {"image_id": ids, "reason": pa.array(["min_side"] * len(ids), pa.string())}, schema=records.FILTERED
    )
