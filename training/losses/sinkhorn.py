"""Sinkhorn-Knopp centering (Caron et al. 2020, SwAV, arXiv:2006.09882; DINOv2, section 4).

Shapes: B rows on this process, K prototypes.
"""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def sinkhorn_knopp(
    scores: Tensor, temperature: float, iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Soft assignments [B, K] of rows to prototypes: each row sums to 1, and prototypes are used evenly.

    `scores` [B, K] are cosines (within [-1, 1]), so exp(score / temperature) stays finite in fp32 for temperatures from
    0.02 up. With a process `group`, prototypes are balanced over the rows of all processes, whose number may differ and
    may be 0.
    """
    assignments = torch.exp(scores.float() / temperature)
    rows = _sum_over(torch.tensor(float(len(scores)), device=scores.device), group)
    assignments /= _sum_over(assignments.sum(), group)
    for _ in range(iterations):
        assignments /= _sum_over(assignments.sum(dim=0, keepdim=True), group) * scores.shape[1]
        assignments /= assignments.sum(dim=1, keepdim=True) * rows
    return assignments * rows


def _sum_over(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(value, group=group)
    return value
