"""The settings of dedup."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lodeset.pipeline.algorithms.copies import shipped
from lodeset.pipeline.algorithms.copies.keepers import RULES, KeeperRule
from lodeset.pipeline.strict import Strict

Threshold = Literal["auto"] | Annotated[float, Field(gt=-1, le=1)]
MaxGroup = Literal["auto"] | Annotated[int, Field(ge=2)]


class Semantic(Strict):
    """Drop images that mean the same as others of their cluster, though they are no copies (SemDeDup, 2023)."""

    eps: float = Field(
        gt=0,
        lt=1,
        description="an image is dropped if its cosine similarity to another one of its cluster is above 1 - eps; larger values drop more",
    )
    keep: Literal["far", "centroid", "random"] = Field(
        "far",
        description="which of several stays: the one farthest from the centroid of the cluster, the nearest, or a random one",
    )
    seed: int = Field(0, ge=0, description="of `random`, and between equals")


class Dedup(Strict):
    """Near-duplicates within the pool and against reference and included sets (DINOv2, section 3)."""

    within: bool = Field(
        True,
        description="drop near-duplicates within the pool; false: compare it only with reference and included sets",
    )
    k: int = Field(64, ge=1, description="number of nearest neighbors searched for each image")
    threshold: Threshold = Field(
        "auto",
        description="cosine above which two images are copies; auto: calibrated for the embedder; 0.6 is right only "
        "for SSCD",
    )
    reference_threshold: Threshold = Field(
        "auto",
        description="the same threshold against reference sets, where a miss costs more; 0.45 is right only for SSCD",
    )
    phash_distance: int = Field(
        4, ge=0, le=16, description="images whose perceptual hashes differ by at most this many bits are copies"
    )
    max_group: MaxGroup = Field(
        "auto",
        description="maximum number of pool images in a group of copies; a larger group stops the run; auto: "
        "max(100, 0.1 % of the pool)",
    )
    verify: Literal["none", "pixels"] = Field(
        "pixels", description="whether candidate pairs are verified on their pixels"
    )
    closeups: bool = Field(
        True,
        description="whether pairs that thumbnails cannot decide are compared on their full images, which are read "
        "again",
    )
    min_detail_score: float | None = Field(
        0.5,
        description="minimum log-odds that two full images agree in their finest content (lines of text, digits, emblems, colors), so "
        "that two receipts of one shop, or two screens of one program, are no copies; 2.5 less against reference sets; needs "
        "closeups; null: details are not compared",
    )
    min_score: float = Field(
        4.0,
        description="minimum log-odds for an aligned pair to be a copy; a higher value accepts fewer but more "
        "certain copies",
    )
    keeper: tuple[KeeperRule, ...] = Field(
        RULES,
        description="rules for choosing the copy of a group that is kept; each rule keeps its best candidates for "
        "the next one. standing: kept by an earlier run; area: the largest, unless it only enlarges a smaller one; "
        "sharpness: not blurred; quality: of the encoding; metadata: the most metadata. Then the largest, then the "
        "smallest id. Included images always take precedence",
    )
    semantic: Semantic | None = Field(
        None, description="semantic deduplication within the clusters of the pool [default: none]"
    )
    calibration_images: int = Field(200, ge=20, description="number of pool images that `auto` makes copies of")
    part_images: int = Field(4_096, ge=1, description="queries per part of the neighbor search; speed only")

    @field_validator("keeper")
    @classmethod
    def _rules_once(cls, value: tuple[KeeperRule, ...]) -> tuple[KeeperRule, ...]:
        twice = sorted({rule for rule in value if value.count(rule) > 1})
        if twice:
            raise ValueError(f"list each rule once; listed more than once: {', '.join(twice)}")
        return value


def computed(dedup: Dedup) -> dict[str, Any]:
    """Everything that decides the results: the settings, and the weights of the evidence."""
    knobs = dedup.model_dump(exclude={"part_images", "calibration_images", "semantic"})
    if dedup.verify == "pixels":
        knobs["copies"] = shipped.identity(shipped.EVIDENCE)
        if dedup.closeups:
            knobs["closeups"] = shipped.identity(shipped.CLOSEUP)
    else:
        del knobs["min_score"], knobs["closeups"]
    if knobs["min_detail_score"] is None or not knobs.get("closeups"):
        del knobs["min_detail_score"]
    else:
        knobs["details"] = shipped.identity(shipped.DETAILS)
    return knobs
