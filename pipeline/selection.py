"""Configuration of what curated sets are expected to contribute, and of images that several sets select."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lodeset.pipeline.strict import Strict


class Expected(Strict):
    """Figures of a set that are known beforehand, e.g. published: `plan` computes with them before anything is read; no
    stage uses them.
    """

    images: int = Field(ge=0, description="number of images of the set")
    retrieved: int | None = Field(
        None, ge=0, description="cluster mode: number of images in the matching clusters, before `limit` is applied"
    )
    final: int | None = Field(None, ge=0, description="number of pool images that the set gets in the end")


class Selection(Strict):
    """How to treat an image that several curated sets select; the shards contain it once in any case."""

    shared: Literal["each", "best"] = Field(
        "each",
        description="`each`: it counts for every set that selects it; `best`: for one set only, the one that "
        "includes it or else the most similar one",
    )
