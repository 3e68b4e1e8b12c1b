"""Kozachenko-Leonenko differential entropy term (Sablayrolles et al. 2018, arXiv:1806.03198; DINOv2, section 4).

Shapes: B images, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def koleo_loss(features: Tensor) -> Tensor:
    """-mean log(distance to the nearest other row) over L2-normalised rows of features [B, D], B >= 2; a scalar."""
    return -torch.log(nearest_distances(features) + 1e-8).mean()


def nearest_distances(features: Tensor) -> Tensor:
    """Euclidean distance [B] of each L2-normalised row of features [B, D] to its nearest other row, in fp32."""
    rows = F.normalize(features.float(), dim=-1)
    with torch.no_grad():
        nearest = (rows @ rows.T).fill_diagonal_(-2.0).argmax(dim=1)
    distances: Tensor = torch.linalg.vector_norm(rows - rows[nearest], dim=1)
    return distances
