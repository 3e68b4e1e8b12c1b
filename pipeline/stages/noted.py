"""What ingest notes about images that it takes, counted for people: columns of `images` tell it of each."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.compute as pc

from pipeline import records
from pipeline.dag.store import File, Store

COLUMNS = ("sample_range", "truncated", "located")


def warnings_of(store: Store, images: Sequence[File]) -> list[str]:
    """A sentence for each kind of image that was taken with reserve."""
    own = cut = placed = 0
    for file in images:
        table = store.table([file], list(COLUMNS), records.IMAGES)
        own += int(pc.sum(pc.ends_with(table["sample_range"], "own)")).as_py() or 0)
        cut += table.num_rows - table["truncated"].null_count
        placed += int(pc.sum(table["located"]).as_py() or 0)
    found = []
    if own:
        found.append(
            f"{_images(own)} of more than 8 bits a sample without a word on what black and white are: the range that each one uses "
            "was taken (column `sample_range` of `images`)"
        )
    if cut:
        found.append(
            f"{_images(cut)} kept of files that lack their end, because nearly all pixels are there (column `truncated` of `images`; "
            "`ingest.truncated: reject` leaves them out)"
        )
    if placed:
        found.append(
            f"{_images(placed)} whose bytes say where they were taken (GPS in EXIF or XMP; column `located` of `images`): shards hold "
            "the bytes as they came; `ingest.strip_location: true` takes the place out of them"
        )
    return found


def _images(count: int) -> str:
    return f"{count} image{'s' if count != 1 else ''}"
