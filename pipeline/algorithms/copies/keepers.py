"""Which image of a group of copies is kept.

Each rule in turn leaves the best images and those that come near them, so that a difference that means nothing (a row of pixels)
does not outweigh one that does (a blur).
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

# Areas as near as this are alike.
_SAME_AREA = 0.98
# An image that holds no more detail than a smaller one, and whose finest octave is emptier, was made by enlarging it. Enlarged
# by half, copies have .81 to .98 of the original's detail and .4 to .75 of its sharpness; crops have that of their original.
_SAME_DETAIL, _EMPTIER = 0.9, 0.75
# How much detail a coarse encoding adds, at most; measured at JPEG's quality 50: 1.1 to 1.8.
_COARSE, _FINE, _ARTEFACTS = 50.0, 85.0, 0.5
# Sharper than this means noise, text or dithering as often as detail. Blurred copies have less than this share of the sharpest.
_SHARP, _AS_SHARP = 3.0, 0.65
_SAME_QUALITY = 5.0


@dataclass(frozen=True)
class Looks:
    """What is known of N images (`algorithms.images.quality`). Nodes must be numbered in the order of their ids.

    Attributes:
        standing: which were kept before.
        contrast: variance of the luminance.
        said: how many of label, caption, URL and licence the sources tell.
    """

    standing: NDArray[np.bool_]
    area: Ints
    detail: Floats
    sharpness: Floats
    quality: Floats
    contrast: Floats
    said: Ints


def keepers(component: Ints, looks: Looks, rules: Sequence[KeeperRule] = RULES) -> Ints:
    """For each node, which node of its component is kept, int64 [N]."""
    best = np.arange(len(component), dtype=np.int64)
    order = np.argsort(component, kind="stable")
    ends = np.flatnonzero(np.diff(component[order], append=-1))
    start = 0
    for end in (ends + 1).tolist():
        if end - start > 1:
            group = order[start:end]
            best[group] = _keeper(group, looks, rules)
        start = end
    return best


def _keeper(group: Ints, looks: Looks, rules: Sequence[KeeperRule]) -> int:
    left = group
    for rule in rules:
        left = left[_passes(rule, left, looks)]
        if len(left) == 1:
            break
    return int(min(left, key=lambda node: (-looks.area[node], node)))


def _passes(rule: KeeperRule, nodes: Ints, looks: Looks) -> NDArray[np.bool_]:
    """Which nodes a rule leaves: at least one."""
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
    """Which images only enlarge a smaller one of the group; never all of them, because the smallest does not."""
    area, sharpness, quality = looks.area[nodes], looks.sharpness[nodes], looks.quality[nodes]
    detail = looks.detail[nodes] / np.maximum(looks.contrast[nodes], 1.0)
    coarse = np.clip((_FINE - quality) / (_FINE - _COARSE), 0, 1)
    told = detail / (1 + _ARTEFACTS * coarse)  # of the smaller one: what is certainly the picture's
    return np.array(
        [
            bool(
                (
                    (area < _SAME_AREA * area[n])
                    & (told >= _SAME_DETAIL * detail[n])
                    & (sharpness[n] <= _EMPTIER * sharpness)
                ).any()
            )
            for n in range(len(nodes))
        ]
    )
