"""Configuration of what curated sets are expected to bring, and of what they share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lodeset.pipeline.strict import Strict


class Expected(Strict):
    """What is known of a set beforehand, e.g. published: `plan` reckons with it before anything is read, no stage does."""

    images: int = Field(ge=0, description="images of the set")
    retrieved: int | None = Field(
        None, ge=0, description="cluster mode: what the matching clusters give, before `limit` cuts it"
    )
    final: int | None = Field(None, ge=0, description="pool images that the set gets in the end")


class Selection(Strict):
    """What becomes of an image that several curated sets want; the shards hold it once in any case."""

    shared: Literal["each", "best"] = Field(
        "each",
        description="`each`: every set that wants it has it; `best`: one set alone, which includes it itself or else finds it most similar",
    )
