"""The parts of the section `filter`: classifiers, faces, lists. The section itself is made of the listed filters (`masks`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lodeset.pipeline.embedders.config import BATCH, MEAN, SIZE, STD, Positive
from lodeset.pipeline.strict import Strict

# Reasons that more than one file speaks of.
BLUR, BLOCKED_DOMAIN, BLOCKED_URL = "blur", "blocked_domain", "blocked_url"

FACES_SIDE = 320  # pixels of a detector's input, where nothing says it
Listed = Annotated[str, Field(min_length=1)] | tuple[Annotated[str, Field(min_length=1)], ...]


class Classifier(Strict):
    """A network that judges images, run by onnxruntime: images in, as for an embedder of kind `onnx`; [B, C] or [B] out."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9_-]{0,63}$", description="the reason of the images that it drops, e.g. nsfw"
    )
    path: str = Field(min_length=1, description="the .onnx file")
    size: int | None = Field(None, ge=8, description=SIZE.format(default=224))
    mean: tuple[float, float, float] | None = Field(None, description=MEAN)
    std: tuple[Positive, Positive, Positive] | None = Field(None, description=STD)
    output: str | None = Field(None, description="name of the network's output; needed where it has several")
    index: int | None = Field(
        None, ge=0, description="which of the C numbers of an image is its score; needed where C > 1"
    )
    activation: Literal["none", "sigmoid", "softmax"] = Field(
        "none", description="what makes scores of the network's numbers; softmax goes over the C numbers of an image"
    )
    keep: Literal["below", "above"] = Field(
        description="below: keep scores < threshold (NSFW, watermark); above: keep scores >= threshold (aesthetic)"
    )
    threshold: float = Field(description="a score")
    batch: int = Field(32, ge=1, description=BATCH)

    @model_validator(mode="after")
    def _named_apart(self) -> Classifier:
        from lodeset.pipeline.filters.masks import taken_names  # which lists classifiers, too

        taken = taken_names()
        if self.name in taken:
            raise ValueError(f"name {self.name} is the reason of another filter ({', '.join(taken)}): choose another")
        return self


class Faces(Strict):
    """A detector whose finds are blurred, run by onnxruntime an image at a time: the image squeezed to the square in, as for an
    embedder of kind `onnx`; out come boxes [N, 4] (left, top, right, bottom) and scores [N], or [1, N, 4] and [1, N].
    """

    path: str = Field(min_length=1, description="the .onnx file")
    size: int | None = Field(None, ge=8, description=SIZE.format(default=FACES_SIDE))
    mean: tuple[float, float, float] | None = Field(None, description=MEAN)
    std: tuple[Positive, Positive, Positive] | None = Field(None, description=STD)
    boxes: Literal["normalised", "pixels"] = Field(
        "normalised", description="unit of the boxes: shares of the input's side, or its pixels"
    )
    threshold: float = Field(0.5, description="boxes of at least this score are blurred")
    expand: float = Field(0.1, ge=0, le=1, description="a box grows by this share of its diagonal on every side")


class Filters(Strict):
    """Masks of pool images between embed and dedup; changing one embeds nothing again. Other sets are not filtered.

    An image's reason is the first filter that it fails, in the order of the keys. `min_side`, `max_aspect`, `blank` and the
    lists read tables alone; `min_sharpness` and `classifiers` need one pass over the images (stage `score`), whose scores
    are kept: another threshold reads no image.
    """

    @model_validator(mode="after")
    def _names_differ(self) -> Filters:
        names = [one.name for one in getattr(self, "classifiers", ())]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"classifiers are told apart by name; used twice: {', '.join(twice)}")
        return self
