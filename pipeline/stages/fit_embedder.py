"""fit_embedder (Ray): a seeded sample of the pool -> a frozen patch dictionary."""

from __future__ import annotations

import functools
import hashlib
import io
import time
from collections.abc import Sequence

import numpy as np

from lodeset.pipeline.algorithms.images.decoding import decode
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Artifact, File, Part, Rows, Store
from lodeset.pipeline.embedders.config import PatchDictionary
from lodeset.pipeline.engines.ray import map_items
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.specs import FitEmbedderRuntime, FitEmbedderSpec
from lodeset.pipeline.tables import records

VERSION = FitEmbedderSpec.VERSION
STAGE = "fit_embedder"


def run(context: Context[FitEmbedderSpec, FitEmbedderRuntime]) -> Outcome:
    config = context.runtime.embedder
    ingested = context.inputs["images"]
    sample = seeded_sample(context.store, ingested, config.fit_images, config.seed)
    key = digest(STAGE, VERSION, context.fingerprint)
    work = [(key, sample, len(sample))]
    make = functools.partial(_fit, context.store, config, context.runtime.max_pixels, key, context.cpus)
    parts, new = made(context, STAGE, work, functools.partial(map_items, make, cpus=1, address=context.ray_address))
    total = ingested.rows.kept
    return Outcome(
        tables={"dictionary": (parts[0].files["dictionary"],)},
        rows=Rows(
            taken=total, kept=len(sample), dropped={"not_sampled": total - len(sample)} if total > len(sample) else {}
        ),
        details={"parts": 1, "parts_made": len(new)},
    )


def seeded_sample(store: Store, ingested: Artifact, count: int, seed: int) -> list[Location]:
    """The `count` images with the smallest SHA-256 of (seed, image_id), in the order of their bytes.

    Independent of how the set is cut into parts; a grown pool's sample keeps most of the old one.
    """
    columns = ["image_id", "uri", "member", "offset", "size_bytes"]
    table = store.table(ingested.tables["locations"], columns, records.LOCATIONS)
    ids = sorted(set(table["image_id"].to_pylist()), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    left = set(ids[:count])
    chosen = []
    for row in table.to_pylist():
        if row["image_id"] in left:
            left.discard(row["image_id"])
            chosen.append(Location(**row))
    return chosen


def _fit(
    store: Store, config: PatchDictionary, max_pixels: int, key: str, threads: int, sample: Sequence[Location]
) -> Part:
    from lodeset.pipeline.embedders.patches import fit

    started = time.perf_counter()
    images = []
    for _, data in read_images(sample):
        # The dictionary sees `size` pixels a side; keeping photographs whole would hold gigabytes.
        image = decode(data, max_pixels)
        image.thumbnail((4 * config.size, 4 * config.size))
        images.append(image)
    # Order decides which patches a seed draws, and where the bytes lie must not.
    order = np.argsort([place.image_id for place in sample])
    fitted = fit([images[i] for i in order], config, threads)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **fitted.arrays())
    relative = f"parts/{STAGE}/{key}/{time.time_ns():x}-dictionary.npz"
    with store.writing(relative) as sink:
        sink.write(buffer.getvalue())
    file = File(relative, config.words, sink.size_bytes, sink.sha256())
    return store.commit_part(
        STAGE, key, {}, {"images": len(images)}, time.perf_counter() - started, files={"dictionary": file}
    )
