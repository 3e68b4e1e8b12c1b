"""Which files and members of a source the user wants, by patterns."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lodeset.pipeline.strict import Strict


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)]


class Members(Strict):
    """Which files of a folder, or members of a tar, are images to read; the others are counted as `excluded`."""

    include: Patterns = Field((), description="only these, e.g. `*.jpg`; absent: whatever decodes")
    exclude: Patterns = Field((), description="not these, e.g. `*.seg.png` or `masks/`; this holds for sidecars too")

    def takes(self, name: str) -> bool:
        """Whether an image of this name is read."""
        return not matches(name, self.exclude) and (not self.include or matches(name, self.include))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path is meant by one of these patterns, capitals aside.

    A pattern without a slash means files and folders of that name at any depth (`*.gif`, `thumbnails`), one with a slash the path
    from the source on (`2019/raw`), and all that lies in a folder is meant with it. `*` stands for slashes too.
    """
    if not patterns:
        return False
    pieces = name.lower().strip("/").split("/")
    paths = ["/".join(pieces[: n + 1]) for n in range(len(pieces))]
    for pattern in patterns:
        wanted = pattern.lower().removeprefix("./").removeprefix("**/").removesuffix("**").strip("/")
        anywhere = pattern.startswith("**/") or "/" not in wanted
        tails = ["/".join(pieces[n:m]) for m in range(1, len(pieces) + 1) for n in range(m)] if anywhere else paths
        if any(fnmatch.fnmatchcase(one, wanted) for one in tails):
            return True
    return False
