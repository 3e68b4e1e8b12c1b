"""The knobs of dedup."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lodeset.pipeline.algorithms.copies import shipped
from lodeset.pipeline.algorithms.copies.keepers import RULES, KeeperRule
from lodeset.pipeline.strict import Strict

Threshold = Literal["auto"] | Annotated[float, Field(gt=-1, le=1)]
MaxGroup = Literal["auto"] | Annotated[int, Field(ge=2)]


class Dedup(Strict):
    """Near-duplicates within the pool and against reference and included sets (DINOv2, section 3)."""

    within: bool = Field(
        True,
        description="drop near-duplicates within the pool; false compares it with reference and included sets only",
    )
    k: int = Field(64, ge=1, description="nearest neighbours searched for each image")
    threshold: Threshold = Field(
        "auto", description="cosine above which two images are copies; `auto` calibrates; 0.6 is right for SSCD only"
    )
    reference_threshold: Threshold = Field(
        "auto", description="the same against reference sets, where a miss costs more; 0.45 is right for SSCD only"
    )
    phash_distance: int = Field(4, ge=0, le=16, description="perceptual hashes at most this many bits apart are copies")
    max_group: MaxGroup = Field(
        "auto",
        description="pool images in a group of copies above which the run stops; auto: max(100, 0.1 % of the pool)",
    )
    verify: Literal["none", "pixels"] = Field("pixels", description="check candidate pairs on their pixels")
    closeups: bool = Field(
        True,
        description="whether pairs that thumbnails leave in doubt are compared on their full images, which are read again",
    )
    min_score: float = Field(
        4.0, description="log-odds from which a pair that was aligned is a copy; higher takes fewer, surer ones"
    )
    keeper: tuple[KeeperRule, ...] = Field(
        RULES,
        description="which copy of a group is kept: each rule in turn leaves the best ones. standing: kept before; area: the "
        "largest, unless it only enlarges a smaller one; sharpness: not blurred; quality: of the encoding; metadata: most is "
        "said about it. At last the largest, then the smallest id. Copies of included images always give way to these",
    )
    calibration_images: int = Field(200, ge=20, description="pool images that `auto` makes copies of")
    part_images: int = Field(4_096, ge=1, description="queries per part of the neighbour search; speed only")

    @field_validator("keeper")
    @classmethod
    def _rules_once(cls, value: tuple[KeeperRule, ...]) -> tuple[KeeperRule, ...]:
        twice = sorted({rule for rule in value if value.count(rule) > 1})
        if twice:
            raise ValueError(f"each rule stands once; more than once: {', '.join(twice)}")
        return value


def computed(dedup: Dedup) -> dict[str, Any]:
    """What decides the results: the knobs, and what pairs are weighed by."""
    knobs = dedup.model_dump(exclude={"part_images", "calibration_images"})
    if dedup.verify == "pixels":
        knobs["copies"] = shipped.identity(shipped.EVIDENCE)
        if dedup.closeups:
            knobs["closeups"] = shipped.identity(shipped.CLOSEUP)
    else:
        del knobs["min_score"], knobs["closeups"]
    return knobs
