"""Block masking (BEiT, Bao et al. 2021, arXiv:2106.08254; as used by iBOT and DINOv2), with exact counts.

Shapes: C crops, N = rows * columns patches of a crop.
"""

import numpy as np
from numpy.typing import NDArray

from lodeset.training.config import MaskingConfig

LEAST_BLOCK = 4  # minimum size of a block in patches
ASPECT = (0.3, 1 / 0.3)  # height / width of a block
ATTEMPTS = 10  # draws of a block that may fail before single patches fill up the mask


def mask_counts(rng: np.random.Generator, crops: int, patches: int, config: MaskingConfig) -> NDArray[np.int64]:
    """Number of patches to mask in each of `crops` crops, [C]; 0 for crops that stay unmasked, which are chosen at
    random.

    The ratios of the masked crops are spread evenly: one draw from each of as many equal intervals of `config.ratio`.
    """
    masked = int(crops * config.probability)
    edges = np.linspace(*config.ratio, masked + 1)
    ratios = rng.uniform(edges[:-1], edges[1:])
    counts = np.zeros(crops, dtype=np.int64)
    counts[rng.permutation(crops)[:masked]] = (ratios * patches).astype(np.int64)
    return counts


def block_mask(rng: np.random.Generator, rows: int, columns: int, count: int) -> NDArray[np.bool_]:
    """A mask [N] in row-major order with exactly `count` True patches, made of rectangles of at least 4 patches.

    Rectangles may overlap. When none fits the remaining count, single patches complete it.
    """
    mask = np.zeros((rows, columns), dtype=bool)
    missing, misses = count, 0
    while missing > 0 and misses < ATTEMPTS:
        area = rng.uniform(LEAST_BLOCK, max(missing, LEAST_BLOCK))
        aspect = np.exp(rng.uniform(*np.log(ASPECT)))
        height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if height * width < LEAST_BLOCK or height > rows or width > columns:
            misses += 1
            continue
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = mask[top : top + height, left : left + width]
        new = block.size - int(block.sum())
        if 0 < new <= missing:
            block[:] = True
            missing -= new
            misses = 0
        else:
            misses += 1
    if missing:
        mask.ravel()[rng.choice(np.flatnonzero(~mask), missing, replace=False)] = True
    return mask.ravel()
