"""The stages of `filter`: faces blurred, scores, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Input, Stage, deferred
from lodeset.pipeline.filters import blocklists, models
from lodeset.pipeline.filters.config import BLUR, Faces, blank_below
from lodeset.pipeline.specs import (
    IMAGES,
    METADATA,
    BlurFacesRuntime,
    BlurFacesSpec,
    FilterRuntime,
    FilterSpec,
    ScoreRuntime,
    ScoreSpec,
)

MEASURED_BLUR = {"measure": "finest octave", "version": 1}  # of `algorithms.images.sharpness`


def blur_faces_stage(config: CurationConfig, detector: Faces, pool: Stage) -> Stage:
    """The pool with its faces blurred, in place of what ingest found."""
    return Stage(
        "blur_faces",
        "pool",
        BlurFacesSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.blur_faces:run"),
        spec=BlurFacesSpec(detector=models.detector_identity(detector), store=digest(config.store)),
        inputs={"images": Input(pool)},  # all of it: where the bytes lie is listed anew
        runtime=BlurFacesRuntime(faces=detector, max_pixels=config.ingest.max_pixels),
        max_cpus=pool.max_cpus,
        seconds_per_image=0.01,
    )


def score_stage(config: CurationConfig, pool: Stage) -> Stage | None:
    """What filters that look at pixels measure; None where there are none."""
    scorers: dict[str, Mapping[str, Any]] = {}
    if config.filter.min_sharpness is not None:
        scorers[BLUR] = MEASURED_BLUR
    scorers |= {one.name: models.classifier_identity(one) for one in config.filter.classifiers}
    if not scorers:
        return None
    return Stage(
        "score",
        "pool",
        ScoreSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.score:run"),
        spec=ScoreSpec(scorers=scorers),
        inputs={"images": Input(pool, IMAGES)},
        runtime=ScoreRuntime(classifiers=config.filter.classifiers, max_pixels=config.ingest.max_pixels),
        max_cpus=pool.max_cpus,
        # Reading and decoding with the sharpness, and a network of MobileNetV2's size each.
        seconds_per_image=0.0004 + 0.005 * len(config.filter.classifiers),
    )


def filter_stage(config: CurationConfig, pool: Stage, scored: Stage | None) -> Stage:
    """Which images of the pool go no further."""
    masks = FilterRuntime(config=config.filter, lists=blocklists.read(config.filter))
    return Stage(
        "filter",
        "pool",
        FilterSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.filter:run"),
        spec=_thresholds(masks),
        inputs={
            "images": Input(pool, IMAGES),
            **({"scores": Input(scored)} if scored else {}),
            **({"metadata": Input(pool, METADATA)} if masks.lists else {}),
        },
        runtime=masks,
        max_cpus=pool.max_cpus,
        seconds_per_image=0.00002,
    )


def _thresholds(masks: FilterRuntime) -> FilterSpec:
    config, lists = masks.config, masks.lists
    return FilterSpec(
        min_side=config.min_side,
        max_aspect=config.max_aspect,
        blank=None if config.blank is False else blank_below(config),
        min_sharpness=config.min_sharpness,
        # Their order decides which reason counts, and a mapping has none in a fingerprint.
        classifiers={
            one.name: {"keep": one.keep, "threshold": one.threshold, "place": place}
            for place, one in enumerate(config.classifiers)
        }
        or None,
        blocked_domains={"hosts": len(lists.hosts), "digest": digest(lists.hosts)} if lists.hosts else None,
        blocked_urls={"starts": len(lists.starts), "digest": digest(lists.starts)} if lists.starts else None,
    )
