"""Settings of what `lodeset inspect` makes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lodeset.pipeline.strict import Strict


class Inspect(Strict):
    """What is made of a run to be looked at. No result depends on it."""

    map: Literal["pca", "umap"] = Field(
        "pca",
        description="how the map places images: by the first two principal components of their vectors, at once, or by UMAP, "
        "which takes minutes (`pip install 'lodeset[umap]'`)",
    )
