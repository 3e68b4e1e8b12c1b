"""Which pool images a curated set asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def seeded_order(ids: Sequence[str], seed: int) -> list[int]:
    """Row numbers in an order that looks random and depends on seed and ids alone, not on where the rows lie."""
    keys = [hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in ids]
    return sorted(range(len(ids)), key=keys.__getitem__)


def matched_clusters(query_clusters: NDArray[np.int32], min_matches: int) -> list[int]:
    """Clusters in which at least `min_matches` queries fall."""
    values, counts = np.unique(query_clusters, return_counts=True)
    return [int(v) for v, n in zip(values, counts, strict=True) if n >= min_matches]


def draw(members: Mapping[int, Sequence[str]], per_cluster: int, limit: int, seed: int) -> dict[int, list[str]]:
    """min(per_cluster, size) images of each cluster, at most `limit` in all, seeded by image_id.

    Where the limit binds, every cluster keeps the same share of its draw (largest remainders first, then cluster number).
    """
    drawn = {c: [members[c][i] for i in seeded_order(members[c], seed)[:per_cluster]] for c in sorted(members)}
    total = sum(map(len, drawn.values()))
    if total <= limit:
        return drawn
    exact = {c: len(ids) * limit / total for c, ids in drawn.items()}
    share = {c: int(e) for c, e in exact.items()}
    rest = limit - sum(share.values())
    for c in sorted(exact, key=lambda c: (share[c] - exact[c], c))[:rest]:
        share[c] += 1
    return {c: ids[: share[c]] for c, ids in drawn.items()}
