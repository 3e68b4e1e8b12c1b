"""Choose the image of a group of copies that is kept.

Each rule keeps the best images and those close to them, so that an insignificant difference (a row of pixels) does not
outweigh a significant one (blur).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
KeeperRule = Literal["standing", "area", "sharpness", "quality", "metadata"]
RULES: tuple[KeeperRule, ...] = get_args(KeeperRule)

# Areas within this factor count as equal.
_SAME_AREA = 0.98
# An image with no more detail than a smaller one, and with less in its finest octave, was made by enlarging it. Copies
# enlarged by half have .81 to .98 of the original's detail and .4 to .75 of its sharpness; crops have that of their
# original.
_SAME_DETAIL, _EMPTIER = 0.9, 0.75
# Maximum share of detail that a coarse encoding adds; measured at JPEG's quality 50: 1.1 to 1.8.
_COARSE, _FINE, _ARTEFACTS = 50.0, 85.0, 0.5
# Above this, sharpness comes from noise, text or dithering as often as from detail. Blurred copies have less than this
# share of the sharpest.
_SHARP, _AS_SHARP = 3.0, 0.65
_SAME_QUALITY = 5.0


@dataclass(frozen=True)
class Looks:
    """What is known of N images (`algorithms.images.quality`). Nodes must be numbered in the order of their ids.

    Attributes:
        standing: whether an earlier run kept them.
        contrast: variance of the luminance.
        said: how many of label, caption, URL and license the sources give.
    """

    standing: NDArray[np.bool_]
    area: Ints
    detail: Floats
    sharpness: Floats
    quality: Floats
    contrast: Floats
    said: Ints


def keepers(
    component: Ints, looks: Looks, rules: Sequence[KeeperRule] = RULES, wanted: NDArray[np.bool_] | None = None
) -> Ints:
    """For each node, the node of its component that is kept, int64 [N]; one of the `wanted` ones where there are any."""
    best = np.arange(len(component), dtype=np.int64)
    order = np.argsort(component, kind="stable")
    ends = np.flatnonzero(np.diff(component[order], append=-1))
    start = 0
    for end in (ends + 1).tolist():
        if end - start > 1:
            group = order[start:end]
            chosen = group if wanted is None else group[wanted[group]]
            best[group] = _keeper(chosen if len(chosen) else group, looks, rules)
        start = end
    return best


def _keeper(group: Ints, looks: Looks, rules: Sequence[KeeperRule]) -> int:
    candidates = group
    for rule in rules:
        if len(candidates) == 1:
            break
        candidates = candidates[_passes(rule, candidates, looks)]
    return int(min(candidates, key=lambda node: (-looks.area[node], node)))


def _passes(rule: KeeperRule, nodes: Ints, looks: Looks) -> NDArray[np.bool_]:
    """The nodes that a rule keeps, at least one."""
    if rule == "standing":
        standing: NDArray[np.bool_] = looks.standing[nodes]
        return standing if standing.any() else ~standing
    if rule == "area":
        real = ~_enlarged(nodes, looks)
        area = looks.area[nodes]
        return np.asarray(real & (area >= _SAME_AREA * area[real].max()))
    if rule == "sharpness":
        sharpness = np.minimum(looks.sharpness[nodes], _SHARP)
        return np.asarray(sharpness >= _AS_SHARP * sharpness.max())
    if rule == "quality":
        quality = looks.quality[nodes]
        return np.asarray(quality >= quality.max() - _SAME_QUALITY)
    said = looks.said[nodes]
    return np.asarray(said == said.max())


def _enlarged(nodes: Ints, looks: Looks) -> NDArray[np.bool_]:
    """The images that only enlarge a smaller one of the group; never all of them, because the smallest does not."""
    area, sharpness, quality = looks.area[nodes], looks.sharpness[nodes], looks.quality[nodes]
    detail = looks.detail[nodes] / np.maximum(looks.contrast[nodes], 1.0)
    coarse = np.clip((_FINE - quality) / (_FINE - _COARSE), 0, 1)
    certain = detail / (1 + _ARTEFACTS * coarse)  # of the smaller image: detail that certainly belongs to the picture
    return np.array(
        [
            bool(
                (
                    (area < _SAME_AREA * area[n])
                    & (certain >= _SAME_DETAIL * detail[n])
                    & (sharpness[n] <= _EMPTIER * sharpness)
                ).any()
            )
            for n in range(len(nodes))
        ]
    )
