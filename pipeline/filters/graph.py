"""The stages of `filter`: faces blurred, scores, masks."""

from __future__ import annotations

from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Input, Stage
from lodeset.pipeline.filters import blocklists, classifiers, faces
from lodeset.pipeline.filters.config import Faces
from lodeset.pipeline.stages import blur_faces, filter, score
from lodeset.pipeline.stages.ingest.run import IMAGES, METADATA


def blur_faces_stage(config: CurationConfig, detector: Faces, pool: Stage) -> Stage:
    """The pool with its faces blurred, in place of what ingest found."""
    return Stage(
        "blur_faces",
        "pool",
        blur_faces.VERSION,
        "ray",
        blur_faces.run,
        # Like ingest it tells where bytes lie, some of them in the store.
        config={"detector": faces.identity(detector), "store": digest(config.store)},
        inputs={"images": Input(pool)},  # all of it: where the bytes lie is listed anew
        speed={"faces": detector, "max_pixels": config.ingest.max_pixels},
        max_cpus=pool.max_cpus,
        seconds_per_image=0.01,
    )


def score_stage(config: CurationConfig, pool: Stage) -> Stage | None:
    """What filters that look at pixels measure; None where there are none."""
    scorers = score.scorers_of(
        config.filter.min_sharpness, {one.name: classifiers.identity(one) for one in config.filter.classifiers}
    )
    if not scorers:
        return None
    return Stage(
        "score",
        "pool",
        score.VERSION,
        "ray",
        score.run,
        config={"scorers": scorers},
        inputs={"images": Input(pool, IMAGES)},
        speed={"classifiers": config.filter.classifiers, "max_pixels": config.ingest.max_pixels},
        max_cpus=pool.max_cpus,
        # Reading and decoding with the sharpness, and a network of MobileNetV2's size each.
        seconds_per_image=0.0004 + 0.005 * len(config.filter.classifiers),
    )


def filter_stage(config: CurationConfig, pool: Stage, scored: Stage | None) -> Stage:
    """Which images of the pool go no further."""
    masks = filter.Masks(config.filter, blocklists.read(config.filter))
    return Stage(
        "filter",
        "pool",
        filter.VERSION,
        "ray",
        filter.run,
        config=filter.knobs(masks),
        inputs={
            "images": Input(pool, IMAGES),
            **({"scores": Input(scored)} if scored else {}),
            **({"metadata": Input(pool, METADATA)} if masks.lists else {}),
        },
        speed={"masks": masks},
        max_cpus=pool.max_cpus,
        seconds_per_image=0.00002,
    )
