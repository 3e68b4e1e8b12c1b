"""Softmax centering of the teacher's scores (Caron et al. 2021, DINO, arXiv:2104.14294, section 3.1).

Shapes: B rows on this process, K prototypes.
"""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def centred(
    scores: Tensor, center: Tensor, temperature: float, momentum: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Probabilities [B, K] of scores [B, K] minus the moving mean `center` [K], which is then updated with these
    scores.

    With a process `group` it is updated with the mean over the rows of all processes, whose number may differ and may
    be 0.
    """
    probabilities = torch.softmax((scores.float() - center) / temperature, dim=-1)
    total = torch.cat([scores.float().sum(dim=0), scores.new_tensor([len(scores)], dtype=torch.float32)])
    if group is not None:
        dist.all_reduce(total, group=group)
    if total[-1] > 0:
        center.lerp_(total[:-1] / total[-1], 1 - momentum)
    return probabilities
