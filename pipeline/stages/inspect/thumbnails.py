"""thumbnails (Ray): `images` + `locations` -> `thumbnails`, a small WebP of every image of every set.

A part is what one ingest part holds, keyed by its image_ids, so data that moved, and a pool that grew, are not read again. A file's
row groups are so short that a page reads few pictures for each that it shows.
"""

from __future__ import annotations

import functools
import io
import time
import uuid

import pyarrow as pa
from PIL import Image

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import File, Part, Rows, Store
from lodeset.pipeline.engines.ray import map_items
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.stages.inspect.graph import ThumbnailsRuntime, ThumbnailsSpec
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.images import image_ids, places_of

STAGE, TABLE = "thumbnails", "thumbnails"
ROW_GROUP = 32  # pictures, about 100 kB


def run(context: Context[ThumbnailsSpec, ThumbnailsRuntime]) -> Outcome:
    spec, work = context.spec, {}
    for _, ingested in sorted(context.inputs.items()):
        for images, locations in zip(ingested.tables["images"], ingested.tables["locations"], strict=True):
            key = digest(STAGE, spec.VERSION, image_ids(context.store, images), spec.side, spec.quality)
            work[key] = (key, (key, images, locations), images.rows)  # two sets may hold the same images
    make = functools.partial(_make, context.store, spec, context.runtime.max_pixels)
    parts, new = made(
        context,
        STAGE,
        list(work.values()),
        functools.partial(
            map_items, make, cpus=context.cpus, address=context.ray_address, seconds=lambda item: 0.004 * item[1].rows
        ),
    )
    count = sum(part.files[TABLE].rows for part in parts)
    return Outcome(
        tables={TABLE: tuple(part.files[TABLE] for part in parts)},
        rows=Rows(taken=count, kept=count),
        details={"parts": len(parts), "parts_made": len(new)},
    )


def _make(store: Store, spec: ThumbnailsSpec, max_pixels: int, item: tuple[str, File, File]) -> Part:
    key, images, locations = item
    started = time.perf_counter()
    ids = image_ids(store, images)
    rows = places_of(store, images, locations).to_pylist()
    places = [Location(r["image_id"], r["uri"], r["member"], r["offset"], r["size_bytes"]) for r in rows]
    found = {
        place.image_id: thumbnail(decode(data, max_pixels), spec.side, spec.quality)
        for place, data in read_images(places)
    }
    table = pa.table({"image_id": ids, "picture": [found.get(image_id) for image_id in ids]}, records.THUMBNAILS)
    path = f"parts/{STAGE}/{key}/{uuid.uuid4().hex[:12]}-{TABLE}.parquet"
    file = store.write_named(path, table, row_group=ROW_GROUP)
    return store.commit_part(STAGE, key, {}, {"images": len(ids)}, time.perf_counter() - started, {TABLE: file})


def thumbnail(image: Image.Image, side: int = 128, quality: int = 75) -> bytes:
    """A WebP of the whole image, at most `side` pixels a side and never enlarged."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()
