"""The thumbnails that galleries show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lodeset.infra.dashboard import render
from lodeset.infra.dashboard.site import Site


@dataclass(frozen=True, kw_only=True)
class Thumb:
    """One image of a gallery, for the macro `gallery`.

    Attributes:
        src: the address of its thumbnail; empty if there is none.
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


def thumb_of(
    site: Site,
    row: Mapping[str, Any],
    *,
    run: int | None = None,
    caption: str = "",
    outcome: str | None = None,
    mark: str = "",
) -> Thumb:
    """The thumbnail of a row of `inspected`, or of some of its columns. By default, its outcome is shown."""
    image_id = row["image_id"]
    return Thumb(
        image_id=image_id,
        src=render.address(site, f"/thumb/{image_id}.webp", run=run),
        large=render.address(site, f"/picture/{image_id}.webp", run=run),
        href=render.address(site, f"/image/{image_id}", run=run),
        caption=caption,
        outcome=row.get("outcome", "") if outcome is None else outcome,
        mark=mark,
    )
