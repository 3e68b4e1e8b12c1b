"""The stages of `filter`: faces blurred, scores, masks."""

from __future__ import annotations

from lodeset.pipeline.by_hand import Lists
from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Input, Stage, deferred
from lodeset.pipeline.filters import masks, models
from lodeset.pipeline.filters.config import Faces
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
    on = masks.prepared(config.filter)
    scorers = masks.scorers(on)
    if not scorers:
        return None
    return Stage(
        "score",
        "pool",
        ScoreSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.score:run"),
        spec=ScoreSpec(scorers={name: scorer.identity() for name, scorer in scorers.items()}),
        inputs={"images": Input(pool, IMAGES)},
        runtime=ScoreRuntime(masks=on, max_pixels=config.ingest.max_pixels),
        max_cpus=pool.max_cpus,
        seconds_per_image=0.0004 + sum(scorer.seconds for scorer in scorers.values()),
    )


def filter_stage(config: CurationConfig, pool: Stage, scored: Stage | None, lists: Lists) -> Stage:
    """Which images of the pool go no further."""
    on = masks.prepared(config.filter)
    return Stage(
        "filter",
        "pool",
        FilterSpec.VERSION,
        "ray",
        deferred("lodeset.pipeline.stages.filter:run"),
        spec=FilterSpec(thresholds=masks.identity(on), by_hand=lists.identity),
        inputs={
            "images": Input(pool, IMAGES),
            **({"scores": Input(scored)} if scored else {}),
            **({"metadata": Input(pool, METADATA)} if masks.reading("metadata", on) else {}),
        },
        runtime=FilterRuntime(masks=on, lists=lists),
        max_cpus=pool.max_cpus,
        seconds_per_image=0.00002,
        reads=tuple(one.place for one in lists.all),
    )
