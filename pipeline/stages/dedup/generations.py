"""Which images were first compared in which run: what makes a search over a grown pool cost only what is new.

A generation is a list of images. The images of each are searched for among those of each other one, and what was found between
two generations stays true; so a run searches only for its new images, and among them. An image that leaves (its source, or a
filter, takes it away) leaves its place empty: should it come back, it is new, because others came while it was away.

New images swallow the newest generations as long as these are not larger than what they make together, as a log-structured
merge tree does: there are never more than log2(N / new) of them, and an image is searched for anew as often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import blocks
from lodeset.pipeline.dag.store import Artifact, File, Store
from lodeset.pipeline.tables import records

STAGE, TABLE, VERSION = "dedup_generations", "generations", 1
# Share of a generation that may have left before the rest is searched anew.
GONE = 0.1

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Generation:
    """Images in the order of their ids, None where one has left; `nodes` [n]: what each is in the universe, -1 there.

    `key` is that of the images that it began with.
    """

    key: str
    ids: tuple[str | None, ...]
    nodes: Ints
    file: File


@dataclass(frozen=True)
class Between:
    """Rows start..stop of one generation, to be searched for among all of another one (their numbers); makes one part."""

    key: str
    queries: int
    base: int
    start: int
    stop: int


def between(
    generations: Sequence[Generation], size: int, basis: Callable[[Generation], tuple[Any, ...]]
) -> list[tuple[str, Between, int]]:
    """The work of `parts.made`: each generation among each, in blocks of `size` rows.

    `basis` is all that what is found in one depends on, besides the images.
    """
    work = []
    for base, searched in enumerate(generations):
        for queries, asking in enumerate(generations):
            for key, block, rows in blocks(len(asking.ids), size, *basis(searched), asking.key, searched.key):
                work.append((key, Between(key, queries, base, block.start, block.stop), rows))
    return work


def generations_of(store: Store, previous: Artifact | None, ids: Sequence[str]) -> list[Generation]:
    """The generations of these images (sorted image_ids), the oldest first; committed where they are new."""
    node_of = {image_id: node for node, image_id in enumerate(ids)}
    earlier = [_known(store, file, node_of) for file in previous.tables[TABLE]] if previous else []
    standing = [one for one in earlier if (one.nodes < 0).mean() <= GONE]
    new = np.ones(len(ids), bool)
    for one in standing:
        new[one.nodes[one.nodes >= 0]] = False
    while new.any() and standing and len(standing[-1].ids) <= new.sum():
        nodes = standing.pop().nodes
        new[nodes[nodes >= 0]] = True
    if new.any():
        own = tuple(ids[node] for node in np.flatnonzero(new).tolist())
        standing.append(_committed(store, digest(STAGE, VERSION, list(own)), own, node_of))
    return standing


def _known(store: Store, file: File, node_of: dict[str, int]) -> Generation:
    table = store.table([file], records.GENERATIONS.names)
    key, before = table["generation"][0].as_py(), tuple(table["image_id"].to_pylist())
    now = tuple(one if one in node_of else None for one in before)
    if now == before:
        return Generation(key, now, _nodes(now, node_of), file)
    return _committed(store, key, now, node_of)


def _committed(store: Store, key: str, ids: tuple[str | None, ...], node_of: dict[str, int]) -> Generation:
    table = pa.table({"image_id": ids, "generation": [key] * len(ids)}, schema=records.GENERATIONS)
    name = digest(key, [row for row, one in enumerate(ids) if one is None])
    part = store.part(STAGE, name) or store.commit_part(STAGE, name, {TABLE: table}, {"images": len(ids)})
    return Generation(key, ids, _nodes(ids, node_of), part.files[TABLE])


def _nodes(ids: Sequence[str | None], node_of: dict[str, int]) -> Ints:
    return np.fromiter((-1 if one is None else node_of[one] for one in ids), np.int64, len(ids))
