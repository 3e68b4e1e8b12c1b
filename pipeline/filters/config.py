"""Every knob of the filters, with its unit: the section `filter`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lodeset.pipeline.algorithms.images.blank import LOW_INFORMATION
from lodeset.pipeline.embedders.config import BATCH, MEAN, SIZE, STD, Positive
from lodeset.pipeline.strict import Strict

# The reasons that are no classifier's name, in the order in which they are tried (classifiers come after `blur`).
MIN_SIDE, MAX_ASPECT, BLANK, BLUR, BLOCKED_DOMAIN, BLOCKED_URL = (
    "min_side", "max_aspect", "blank", "blur", "blocked_domain", "blocked_url"
)  # fmt: skip
RESERVED = (MIN_SIDE, MAX_ASPECT, BLANK, BLUR, BLOCKED_DOMAIN, BLOCKED_URL)

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
        if self.name in RESERVED:
            raise ValueError(
                f"name {self.name} is the reason of another filter ({', '.join(RESERVED)}): choose another"
            )
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


class Filter(Strict):
    """Masks of pool images between embed and dedup; changing one embeds nothing again. Other sets are not filtered.

    An image's reason is the first filter that it fails, in the order of the keys. `min_side`, `max_aspect`, `blank` and the
    lists read tables alone; `min_sharpness` and `classifiers` need one pass over the images (stage `score`), whose scores
    are kept: another threshold reads no image.
    """

    min_side: int = Field(16, ge=1, description="drop images whose shorter side is below this, pixels")
    max_aspect: float | None = Field(
        None, ge=1, description="drop images whose longer side is more than this many times the shorter; 3 suits photos"
    )
    blank: bool | Annotated[float, Field(gt=0, le=127.5)] = Field(
        False,
        description="drop images whose 32 x 32 thumbnail has a luminance deviation below this, 8-bit steps; true: 5",
    )
    min_sharpness: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="drop images of a lower share of detail at the finest scale, 0..1 (docs/decisions/0011); 0.2 drops what is plainly blurred",
    )
    classifiers: tuple[Classifier, ...] = Field((), description="networks with a threshold each")
    blocked_domains: Listed = Field(
        (), description="hosts, with everything below them: a list, or a text file with one a line (# comments)"
    )
    blocked_urls: Listed = Field((), description="starts of URLs (host and path): a list, or a text file like above")

    faces: Faces | None = Field(None, description="blur faces first: such an image is a new one with an id of its own")

    @model_validator(mode="after")
    def _names_differ(self) -> Filter:
        names = [one.name for one in self.classifiers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"classifiers are told apart by name; used twice: {', '.join(twice)}")
        return self


def blank_below(config: Filter) -> float:
    """Standard deviation of a thumbnail's luminance (0 to 255) below which an image is blank."""
    return LOW_INFORMATION if config.blank is True else float(config.blank)
