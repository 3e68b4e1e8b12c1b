"""The thumbnails that galleries show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Thumb:
    """One image of a gallery, for the macro `gallery`.

    Attributes:
        src: the address of its thumbnail; empty if there is none, because of `missing`.
        large: the address of a larger picture for the preview; empty to enlarge the thumbnail.
        href: the page of the image.
        alt: what the picture is to those who do not see it; by default its image_id.
        caption, outcome: the line below, and what became of the image, as a badge.
        mark: how its frame is drawn: `keeper`, `dropped`, `leak` or `chosen`.
    """

    image_id: str
    src: str
    large: str = ""
    href: str = ""
    alt: str = ""
    caption: str = ""
    outcome: str = ""
    mark: str = ""
    missing: str = ""
