"""The one list of filters. The section `filter` of the configuration is made of it, with a knob for each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model

from lodeset.pipeline.by_hand import BY_HAND
from lodeset.pipeline.filters import Mask, Scorer, Side, Table
from lodeset.pipeline.filters.config import Faces, Filters
from lodeset.pipeline.strict import Strict

# In the order in which they count: an image's reason is the first filter that it fails.
LISTED = (
    "lodeset.pipeline.filters.builtin:MIN_SIDE",
    "lodeset.pipeline.filters.builtin:MAX_ASPECT",
    "lodeset.pipeline.filters.builtin:BLANK",
    "lodeset.pipeline.filters.builtin:MIN_SHARPNESS",
    "lodeset.pipeline.filters.builtin:CLASSIFIERS",
    "lodeset.pipeline.filters.builtin:BLOCKED_DOMAINS",
    "lodeset.pipeline.filters.builtin:BLOCKED_URLS",
)


def _mask(reference: str) -> Mask:
    module, _, name = reference.partition(":")
    mask: Mask = getattr(importlib.import_module(module), name)
    return mask


MASKS: Sequence[Mask] = tuple(_mask(reference) for reference in LISTED)
_FACES = Field(None, description="blur faces first: such an image is a new one with an id of its own")

if TYPE_CHECKING:  # a type checker cannot know which filters are listed

    class Filter(Strict):
        faces: Faces | None = None

else:
    Filter = create_model(
        "Filter",
        __base__=Filters,
        __doc__=Filters.__doc__,
        **{mask.knob: (mask.type, mask.field) for mask in MASKS},
        faces=(Faces | None, _FACES),
    )


def prepared(config: Filter) -> dict[str, Any]:
    """What images are compared with, by the knobs of the filters that are on.

    Raises:
        LodesetError: a list that a knob names cannot be read.
    """
    compared = {mask.knob: mask.prepared(getattr(config, mask.knob)) for mask in MASKS}
    return {knob: value for knob, value in compared.items() if value is not None}


def identity(on: Mapping[str, Any]) -> dict[str, Any]:
    """What enters the fingerprint of `filter`: the thresholds of the filters that are on."""
    return {mask.knob: mask.identity(on[mask.knob]) for mask in MASKS if mask.knob in on}


def reading(table: Table, on: Mapping[str, Any]) -> list[Mask]:
    """The filters that are on and read this table."""
    return [mask for mask in MASKS if mask.reads == table and mask.knob in on]


def scorers(on: Mapping[str, Any]) -> dict[str, Scorer]:
    """What the filters of pixels that are on score images by, by their reasons."""
    found: dict[str, Scorer] = {}
    for mask in MASKS:
        if mask.scorers is not None and mask.knob in on:
            found |= mask.scorers(on[mask.knob])
    return found


def sides(identities: Mapping[str, Any]) -> dict[str, Side]:
    """What filters of pixels keep, by their reasons; from the identities of the filters that are on."""
    found: dict[str, Side] = {}
    for mask in MASKS:
        if mask.sides is not None and mask.knob in identities:
            found |= mask.sides(identities[mask.knob])
    return found


def reasons(on: Mapping[str, Any]) -> list[str]:
    """Every reason, in the order in which they count."""
    found: list[str] = []
    for mask in MASKS:
        if mask.reason:
            found.append(mask.reason)
        elif mask.sides is not None and mask.knob in on:
            found += mask.sides(mask.identity(on[mask.knob]))
    return found


def taken_names() -> tuple[str, ...]:
    """The reasons that no classifier may be called by."""
    return (BY_HAND, *(mask.reason for mask in MASKS if mask.reason))
