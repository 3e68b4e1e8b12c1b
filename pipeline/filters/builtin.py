"""The filters that come with lodeset. What judges rows imports its libraries when it is called: the configuration is made of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field

from lodeset.pipeline.algorithms.images.blank import LOW_INFORMATION
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.filters import Floats, Mask, Measure, Scorer, Side, failing
from lodeset.pipeline.filters.blocklists import Blocklists, hosts, starts
from lodeset.pipeline.filters.config import BLOCKED_DOMAIN, BLOCKED_URL, BLUR, Classifier, Listed

if TYPE_CHECKING:
    import pyarrow as pa

_BLUR_MEASURE = {"measure": "finest octave", "version": 1}  # of `algorithms.images.sharpness`


def _sides(images: pa.Table) -> tuple[Any, Any]:
    """The shorter and the longer side of each image."""
    width, height = (images[side].to_numpy().astype(np.float64) for side in ("width", "height"))
    return np.minimum(width, height), np.maximum(width, height)


def _too_small(images: pa.Table, least: int) -> pa.Table:
    shorter, _ = _sides(images)
    return failing(images, "min_side", shorter, shorter < least, least)


MIN_SIDE = Mask(
    knob="min_side",
    type=int,
    field=Field(16, ge=1, description="drop images whose shorter side is below this, pixels"),
    reads="images",
    reason="min_side",
    columns=("width", "height"),
    judge=_too_small,
)


def _too_long(images: pa.Table, most: float) -> pa.Table:
    shorter, longer = _sides(images)
    return failing(images, "max_aspect", longer / shorter, longer / shorter > most, most)


MAX_ASPECT = Mask(
    knob="max_aspect",
    type=float | None,
    field=Field(
        None, ge=1, description="drop images whose longer side is more than this many times the shorter; 3 suits photos"
    ),
    reads="images",
    reason="max_aspect",
    columns=("width", "height"),
    judge=_too_long,
)


def _blank_below(value: bool | float) -> float | None:
    """Standard deviation of a thumbnail's luminance (0 to 255) below which an image is blank."""
    return None if value is False else LOW_INFORMATION if value is True else float(value)


def _blank(images: pa.Table, least: float) -> pa.Table:
    deviation = np.array([np.frombuffer(t, np.uint8).std() for t in images["thumbnail"].to_pylist()], np.float64)
    return failing(images, "blank", deviation, deviation < least, least)


BLANK = Mask(
    knob="blank",
    type=bool | Annotated[float, Field(gt=0, le=127.5)],
    field=Field(
        False,
        description="drop images whose 32 x 32 thumbnail has a luminance deviation below this, 8-bit steps; true: 5",
    ),
    reads="images",
    reason="blank",
    prepared=_blank_below,
    columns=("thumbnail",),
    judge=_blank,
)


def _sharpness(image: Image.Image) -> Floats:
    from lodeset.pipeline.algorithms.images.sharpness import luminance, sharpness

    return np.array([sharpness(luminance(image))], np.float32)


MIN_SHARPNESS = Mask(
    knob="min_sharpness",
    type=float | None,
    field=Field(
        None,
        gt=0,
        lt=1,
        description="drop images of a lower share of detail at the finest scale, 0..1 (docs/decisions/0011); 0.2 drops what is plainly blurred",
    ),
    reads="scores",
    reason=BLUR,
    scorers=lambda _: {
        BLUR: Scorer(
            identity=lambda: _BLUR_MEASURE, measure=lambda: Measure(_sharpness, lambda kept: np.concatenate(kept))
        )
    },
    sides=lambda threshold: {BLUR: (threshold, "above")},
)


def _scorer(one: Classifier) -> Scorer:
    def identity() -> Mapping[str, Any]:
        from lodeset.pipeline.filters.models import classifier_identity

        return classifier_identity(one)

    def measure() -> Measure:
        from lodeset.pipeline.filters.classifiers import classifier

        return classifier(one, threads=1)

    return Scorer(identity=identity, measure=measure, model=True, seconds=0.005)  # a network of MobileNetV2's size


def _thresholds(classifiers: Sequence[Classifier]) -> dict[str, Any]:
    # Their order decides which reason counts, and a mapping has none in a fingerprint.
    return {
        one.name: {"keep": one.keep, "threshold": one.threshold, "place": place}
        for place, one in enumerate(classifiers)
    }


def _kept(thresholds: Mapping[str, Mapping[str, Any]]) -> dict[str, Side]:
    in_order = sorted(thresholds.items(), key=lambda named: int(named[1]["place"]))
    return {name: (float(one["threshold"]), one["keep"]) for name, one in in_order}


CLASSIFIERS = Mask(
    knob="classifiers",
    type=tuple[Classifier, ...],
    field=Field((), description="networks with a threshold each"),
    reads="scores",
    prepared=lambda classifiers: classifiers or None,
    identity=_thresholds,
    scorers=lambda classifiers: {one.name: _scorer(one) for one in classifiers},
    sides=_kept,
)


def _blocked(lists_of: Callable[[tuple[str, ...]], Blocklists]) -> Callable[[pa.Table, Any], pa.Table]:
    """Drops the images of which any URL is blocked: an image that was found in two places has two."""

    def judge(metadata: pa.Table, listed: tuple[str, ...]) -> pa.Table:
        import pyarrow as pa

        from lodeset.pipeline.tables import records

        reason = lists_of(listed).judge()
        rows: dict[tuple[str, str], None] = {}
        for image_id, url in zip(metadata["image_id"].to_pylist(), metadata["url"].to_pylist(), strict=True):
            if url and (why := reason(url)) is not None:
                rows[image_id, why] = None
        return pa.Table.from_pylist([{"image_id": i, "reason": why} for i, why in rows], schema=records.FILTERED)

    return judge


BLOCKED_DOMAINS = Mask(
    knob="blocked_domains",
    type=Listed,
    field=Field(
        (), description="hosts, with everything below them: a list, or a text file with one a line (# comments)"
    ),
    reads="metadata",
    reason=BLOCKED_DOMAIN,
    prepared=lambda listed: hosts(listed) or None,
    identity=lambda found: {"hosts": len(found), "digest": digest(found)},
    columns=("url",),
    judge=_blocked(lambda found: Blocklists(found, ())),
)
BLOCKED_URLS = Mask(
    knob="blocked_urls",
    type=Listed,
    field=Field((), description="starts of URLs (host and path): a list, or a text file like above"),
    reads="metadata",
    reason=BLOCKED_URL,
    prepared=lambda listed: starts(listed) or None,
    identity=lambda found: {"starts": len(found), "digest": digest(found)},
    columns=("url",),
    judge=_blocked(lambda found: Blocklists((), found)),
)
