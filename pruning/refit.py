"""Closed-form least-squares refit of a layer on the units kept.

Shapes: n hidden units, m outputs, k units kept.
"""

import numpy as np

from pruning.entropic import Array, Gram, Indices, solve_positive

# Added to the diagonal of the kept units' correlation matrix: above float32 noise in the activations (1e-7), and far
# below any correlation that matters. Duplicate units then share their weight instead of blowing up.
JITTER = 1e-6


def refit(gram: Gram, keep: Indices, name: str) -> tuple[Array, Array]:
    """Weight [m, k] and bias [m] that best rebuild the layer's dense outputs from the units in `keep` [k].

    Least squares on centred data with the ridge JITTER * var(x_i) on unit i; a unit that never varies gets weight zero
    and its constant goes into the bias. `name` is the layer, for messages.

    Raises:
        LodesetError: moments that cannot be used (see `Gram.moments`).
    """
    moments = gram.moments(name)
    weight = np.zeros((len(moments.mean_y), len(keep)))
    varying = moments.varying[keep]
    kept = keep[varying]
    scale = np.sqrt(np.diag(moments.xx)[kept])
    correlation = moments.xx[np.ix_(kept, kept)] / np.outer(scale, scale)
    correlation[np.diag_indices_from(correlation)] += JITTER
    if len(kept):
        solved = solve_positive(correlation, moments.xy[kept] / scale[:, None])
        weight[:, varying] = (solved / scale[:, None]).T
    return weight, moments.mean_y - weight @ moments.mean_x[keep]
