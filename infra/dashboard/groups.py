"""Groups of near-duplicates as dedup found them: their sizes, their least certain links, and how two images are linked."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lodeset.infra.dashboard.data import Data
from lodeset.infra.dashboard.lines import Line, line
from lodeset.infra.dashboard.remembered import remembered
from lodeset.pipeline.algorithms.copies.components import components

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
# Orders of the list of groups.
CERTAINTY, SIZE = "least certain link", "size"
ORDERS = (CERTAINTY, SIZE)


@dataclass(frozen=True)
class Link:
    """A direct link between two images of a group. `limit`: the value of the setting up to which it holds; None if any does."""

    a: str
    b: str
    limit: float | None
    row: int  # of `Data.pairs`


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of N compared images.

    Attributes:
        group: the group of each image, [N]: the number of its first image.
        number: the groups with several images that dedup decides on, [G]; `size` and `weakest` are theirs.
        weakest: the position of the link without which the group would fall apart, inf where every value makes it.
        a, b, row: the linked pairs, sorted by `a`.
    """

    ids: Sequence[str]
    group: Ints
    members: Ints  # sorted by group
    starts: Ints  # of each group in `members`
    number: Ints
    size: Ints
    weakest: Floats
    a: Ints
    b: Ints
    row: Ints
    line: Line | None

    def ordered(self, by: str) -> Ints:
        """The rows of `number` in an order of ORDERS."""
        keys = (self.number, -self.size, self.weakest) if by == CERTAINTY else (self.number, self.weakest, -self.size)
        return np.lexsort(keys)

    def of(self, number: int) -> list[str]:
        """The images of the group of image `number`, reference images among them."""
        group = int(self.group[number])
        start, stop = np.searchsorted(self.starts, [group, group + 1])
        return [self.ids[node] for node in self.members[start:stop].tolist()]

    def links(self, number: int) -> list[Link]:
        """The direct links within the group of image `number`, the least certain first."""
        group = int(self.group[number])
        start, stop = np.searchsorted(self.starts, [group, group + 1])
        nodes = np.sort(self.members[start:stop])
        low, high = np.searchsorted(self.a, nodes), np.searchsorted(self.a, nodes, side="right")
        found = [at for first, last in zip(low.tolist(), high.tolist(), strict=True) for at in range(first, last)]
        links = [Link(self.ids[self.a[at]], self.ids[self.b[at]], self._limit(at), int(self.row[at])) for at in found]
        return sorted(links, key=lambda one: (one.limit is None, self._position(one.limit), one.a, one.b))

    def _limit(self, at: int) -> float | None:
        if self.line is None:
            return None
        limit = float(self.line.limit[self.row[at]])
        return (limit if self.line.setting.falls else -limit) if np.isfinite(limit) else None

    def _position(self, value: float | None) -> float:
        return 0.0 if value is None or self.line is None else self.line.setting.position(value)


@remembered(1)
def groups(data: Data) -> Groups | None:
    """The groups of the run; None before dedup."""
    dedup = data.dedup
    if dedup is None:
        return None
    images, pairs, decides = dedup.images, data.pairs, line(data)
    count = len(images.ids)
    rows = np.flatnonzero(pairs["linked"].to_numpy(zero_copy_only=False))
    a, b = (pairs[name].to_numpy()[rows].astype(np.int64) for name in ("a", "b"))
    order = np.lexsort((b, a))
    a, b, rows = a[order], b[order], rows[order]
    group = components(count, a, b)
    members = np.argsort(group, kind="stable")
    size = np.bincount(group, weights=images.pool | images.included, minlength=count).astype(np.int64)
    number = np.flatnonzero(size > 1)
    weakest = np.full(count, np.inf, np.float32)
    if decides is not None:
        made = decides.joins.made_at(decides.setting.position(decides.setting.now))
        np.minimum.at(weakest, group[decides.joins.a[:made]], decides.joins.limit[:made])
    return Groups(
        ids=images.ids, group=group, members=members, starts=group[members], number=number, size=size[number],
        weakest=weakest[number], a=a, b=b, row=rows, line=decides,
    )  # fmt: skip


def chain(links: Sequence[Link], a: str, b: str) -> list[str]:
    """The fewest images that link a to b, both among them; empty if nothing does."""
    near: dict[str, list[str]] = {}
    for one in links:
        near.setdefault(one.a, []).append(one.b)
        near.setdefault(one.b, []).append(one.a)
    came: dict[str, str | None] = {a: None}
    queue = deque([a])
    while queue and b not in came:
        here = queue.popleft()
        for there in near.get(here, ()):
            if there not in came:
                came[there] = here
                queue.append(there)
    return _back(came, b)


def _back(came: Mapping[str, str | None], b: str) -> list[str]:
    if b not in came:
        return []
    path: list[str] = []
    at: str | None = b
    while at is not None:
        path.append(at)
        at = came[at]
    return path[::-1]
