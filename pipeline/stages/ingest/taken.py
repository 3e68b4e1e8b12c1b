"""One image as ingest takes it: as it came, or without the place where it was taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lodeset.pipeline.algorithms.images.decoding import Examined, Limits, Unreadable
from lodeset.pipeline.algorithms.images.located import location_in
from lodeset.pipeline.algorithms.images.stripping import without_location
from lodeset.pipeline.config import Ingest


@dataclass(frozen=True)
class Taken:
    """`derived_from` is the id of the bytes as they came, where these were changed."""

    found: Examined
    size_bytes: int
    derived_from: str | None

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(one for one in (self.found.image_id, self.derived_from) if one)


def take(data: bytes, settings: Ingest, limits: Limits, examine: Callable[[bytes, Limits], Examined]) -> Taken:
    """What is recorded of an image, and of which bytes.

    Raises:
        Unreadable: as `examine` does; also `truncated` and `location_not_removable`, where the configuration asks for it.
    """
    found = examine(data, limits)
    if found.truncated is not None and settings.truncated == "reject":
        raise Unreadable("truncated", f"{found.truncated:.1%} of the pixels are missing (ingest.truncated: reject)")
    if not (settings.strip_location and found.located):
        return Taken(found, len(data), None)
    clean = without_location(data)
    again = examine(clean, limits)
    looks = [(one.width, one.height, one.format, one.phash, one.thumbnail, one.quality) for one in (found, again)]
    if again.located or location_in(clean) or looks[0] != looks[1]:
        told = f"{found.format}: the place cannot be taken out of the bytes alone (ingest.strip_location)"
        raise Unreadable("location_not_removable", told)
    return Taken(again, len(clean), found.image_id)
