"""Patch-level term: masked image modelling with an online tokenizer (Zhou et al. 2021, iBOT, arXiv:2111.07832).

Shapes: B crops, N patches a crop, M masked patches in all, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ibot_loss(student: Tensor, teacher: Tensor, masks: Tensor, temperature: float) -> Tensor:
    """Cross-entropy on masked patches, averaged within each crop, then over all B crops (unmasked ones count as 0).

    student: scores [M, K]; teacher: probabilities [M, K], both in the order of `masks` [B, N] bool; a scalar.
    """
    cross_entropy = -(teacher * F.log_softmax(student.float() / temperature, dim=-1)).sum(dim=-1)  # [M]
    masked_of_crop = masks.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
    weights = (1.0 / masked_of_crop).expand_as(masks)[masks]  # [M]
    return torch.sum(cross_entropy * weights) / len(masks)
