"""Addresses and thumbnails of one view: all of them keep the run that its address names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Query

from lodeset.infra.dashboard import render
from lodeset.infra.dashboard.gallery import Thumb, thumb_of
from lodeset.infra.dashboard.site import Site, TheSite


@dataclass(frozen=True)
class Links:
    """Where a page of `site` leads, with the run that it was asked for."""

    site: Site
    run: int | None

    def to(self, path: str, **parameters: Any) -> str:
        return render.address(self.site, path, **parameters, run=self.run)

    def thumb(self, image_id: str, mark: str = "", caption: str = "") -> Thumb:
        return thumb_of(self.site, {"image_id": image_id}, run=self.run, mark=mark, caption=caption)

    def thumb_of(self, row: Mapping[str, Any], mark: str = "") -> Thumb:
        """The thumbnail of a row of `inspected`, with its outcome."""
        return thumb_of(self.site, row, run=self.run, mark=mark)

    def pair(self, a: str, b: str) -> str:
        """The page with the evidence of two images."""
        return self.to("/duplicates/pair", a=a, b=b)


def _links(site: TheSite, run: Annotated[int | None, Query(ge=1)] = None) -> Links:
    return Links(site, run)


# The type of a parameter of a route that links to others.
TheLinks = Annotated[Links, Depends(_links)]
