"""What the stages `score` and `filter` judge pool images by. Every filter is a mask: changing one embeds nothing again.

A new filter is a `Mask` in a file of its own and one line in `masks.LISTED` (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float32]
Table = Literal["images", "scores", "metadata"]
Side = tuple[float, Literal["above", "below"]]  # a threshold, and which scores are kept


@dataclass(frozen=True)
class Measure:
    """A filter of pixels in a worker: what it keeps of one image, and the scores of many."""

    prepare: Callable[[Image.Image], Floats]
    scores: Callable[[Sequence[Floats]], Floats]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What gives an image its score.

    Attributes:
        identity: what the score depends on; no threshold, because another threshold reads no image.
        measure: called once in a worker.
        model: it loads a model, which is tried on one image before a run.
        seconds: a rough time for one image, beside reading it.
    """

    identity: Callable[[], Mapping[str, Any]]
    measure: Callable[[], Measure]
    model: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Mask:
    """One filter: its knob of the section `filter`, and which images it drops.

    Filters of tables (`images`, `metadata`) have `columns` and `judge`. Filters of pixels read `scores`: they have `scorers`, and
    `sides` says what is dropped.

    Attributes:
        knob, type, field: the knob's name, its type and its `pydantic.Field`.
        reason: why its images are dropped; "" where `scorers` name several reasons.
        reads: the table that it reads.
        prepared: the knob's value -> what images are compared with; None: the filter is off.
        identity: that -> what of it enters fingerprints, as JSON types.
        columns: of the table, besides image_id.
        judge: rows of the table and what they are compared with -> rows of `filtered` (see `failing`).
        scorers: what images are compared with -> scorers by reason.
        sides: the identity -> what is kept, by reason.
    """

    knob: str
    type: Any
    field: Any
    reads: Table
    reason: str = ""
    prepared: Callable[[Any], Any] = lambda value: value
    identity: Callable[[Any], Any] = lambda value: value
    columns: tuple[str, ...] = ()
    judge: Callable[[pa.Table, Any], pa.Table] | None = None
    scorers: Callable[[Any], Mapping[str, Scorer]] | None = None
    sides: Callable[[Any], Mapping[str, Side]] | None = None


def failing(table: pa.Table, reason: str, values: Any, dropped: Any, threshold: float | None = None) -> pa.Table:
    """`filtered` rows of the images of a table that are `dropped` (a mask of its rows), with their values."""
    import pyarrow as pa

    from lodeset.pipeline.tables import records

    ids = table["image_id"].to_numpy(zero_copy_only=False)[dropped]
    return pa.Table.from_arrays(
        [
            pa.array(ids, pa.string()),
            pa.array([reason] * len(ids), pa.string()),
            pa.array(np.asarray(values)[dropped], pa.float64()),
            pa.array([threshold] * len(ids), pa.float64()),
        ],
        schema=records.FILTERED,
    )
