"""The path of w as a picture: which units carry a group's layers as the penalty grows, and when each unit is removed.

Shapes: n units, R strengths.
"""

from collections.abc import Mapping

import cv2
import numpy as np

from lodeset.pruning.units.moments import Array, Indices

HEIGHT, WIDTH = 320, 420  # pixels: maximum height, approximate width
ROW = 24  # pixels: maximum height of a row
DECADES = 2.0  # decades of n w to either side of 1 that the colors cover
GONE = (228, 228, 224)  # BGR


def in_order(w: Array) -> Indices:
    """Order units [n] of w [R, n] by how long they stay, then by their last weight; the unit that stays longest is
    first.
    """
    lives = (w > 0).sum(axis=0)
    last = w[np.maximum(lives - 1, 0), np.arange(w.shape[1])]
    return np.asarray(np.lexsort((-last, -lives)))


def path_picture(followed: Mapping[float, Array]) -> bytes:
    """A PNG with one column per strength, weakest first, and one row per unit in the order of `in_order`. If there are
    more units than rows, units are subsampled evenly. Colors show log10(n w) from -2 (dark) to 2 (bright); removed
    units are gray.
    """
    w = np.stack([followed[eps] for eps in sorted(followed)])
    order = in_order(w)
    shown = w[:, order[:: -(-len(order) // HEIGHT)]].T  # [rows, R]
    level = (np.log10(np.maximum(shown * w.shape[1], 1e-12)) + DECADES) / (2 * DECADES)
    picture = cv2.applyColorMap((255 * level.clip(0, 1)).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    picture[shown == 0] = GONE
    tall, wide = max(1, min(ROW, HEIGHT // len(shown))), max(1, WIDTH // len(w))
    drawn = picture.repeat(tall, axis=0).repeat(wide, axis=1)
    return bytes(cv2.imencode(".png", drawn)[1].tobytes())
