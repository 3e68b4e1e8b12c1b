"""What ingest notes about images that it takes, counted for people: columns of `images` tell it of each."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.compute as pc

from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.tables import records

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
            f"{_said(own, 'image has', 'images have')} more than 8 bits a sample without saying which values are black and white: each was "
            "scaled by the range of its own values (column `sample_range` of `images`)"
        )
    if cut:
        found.append(
            f"{_said(cut, 'image was', 'images were')} kept although the end of the file is missing, because nearly all pixels are there "
            "(column `truncated` of `images`; `ingest.truncated: reject` leaves such images out)"
        )
    if placed:
        found.append(
            f"{_said(placed, 'image says', 'images say')} where the picture was taken (GPS in EXIF or XMP; column `located` of `images`), and "
            "the shards keep that: `ingest.strip_location: true` removes it"
        )
    return found


def _said(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
