"""Closed-form least-squares refit of a layer on the columns kept.

Shapes: c columns of the layer, m outputs, k columns kept.
"""

import numpy as np

from lodeset.pruning.units.moments import Array, Indices, Moments, solve_positive

# Added to the diagonal of the kept columns' correlation matrix: above float32 noise in the activations (1e-7) and far
# below any correlation that matters. Duplicate units then share their weight instead of diverging.
JITTER = 1e-6


def refit(moments: Moments, keep: Indices) -> tuple[Array, Array]:
    """Weight [m, c], zero outside the columns `keep` [k], and bias [m] that best reconstruct the layer's dense outputs.

    Least squares on centered data with the ridge JITTER * var(x_i) on column i. A column that never varies gets weight
    zero, and its constant contribution goes into the bias.
    """
    weight = np.zeros((len(moments.mean_y), len(moments.mean_x)))
    kept = keep[moments.varying[keep]]
    scale = np.sqrt(np.diag(moments.xx)[kept])
    correlation = moments.xx[np.ix_(kept, kept)] / np.outer(scale, scale)
    correlation[np.diag_indices_from(correlation)] += JITTER
    if len(kept):
        weight[:, kept] = (solve_positive(correlation, moments.xy[kept] / scale[:, None]) / scale[:, None]).T
    return weight, moments.mean_y - weight @ moments.mean_x
