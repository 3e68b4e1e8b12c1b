"""From a pile of uncurated images to a pretrained, pruned vision model, as one DAG.

```python
import lodeset

project = lodeset.load("lodeset.yaml")
project.plan()                       # what would run, and why; spends nothing
project.run()                        # runs what is not finished
project.table("duplicates")          # a pyarrow.Table
project.dataset()                    # the shards that count, for webdataset and Ray Data
project.neighbors("photo.jpg")       # the pool images most similar to it
```
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodeset.pipeline.errors import LodesetError as LodesetError

if TYPE_CHECKING:
    from lodeset.infra.project import Project as Project

__version__ = importlib.metadata.version("lodeset")


def load(config: str | Path, *, overrides: Iterable[str] | Mapping[str, Any] = (), limit: int | None = None) -> Project:
    """A configuration as a `Project`; reads the file, and lists its sources when they are first needed.

    Args:
        config: a `lodeset.yaml` (`lodeset init` writes one).
        overrides: what stands above the file: `["cluster.k=100"]`, or a mapping of dotted keys to values.
        limit: takes a seeded sample of this many pool images instead of all.

    Raises:
        lodeset.LodesetError: the file, a key or a value is wrong.
    """
    from lodeset.infra.project import load

    return load(config, overrides=overrides, limit=limit)
