"""Patch-level term: masked image modeling with an online tokenizer (Zhou et al. 2021, iBOT, arXiv:2111.07832).

Shapes: B crops, N patches per crop, M masked patches in total, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24  # number of scores whose cross-entropy is computed at once: 64 MiB in fp32, several times over


def ibot_loss(student: Tensor, teacher: Tensor, masks: Tensor, temperature: float) -> Tensor:
    """Cross-entropy on masked patches, averaged within each crop, then over all B crops (unmasked crops count as 0).

    student: scores [M, K]; teacher: probabilities [M, K], both in the order of `masks` [B, N] bool; the result is a
    scalar. If M x K is large (distillation: every patch, 131,072 prototypes), it is computed in chunks of rows and
    recomputed in the backward pass.
    """
    masked_of_crop = masks.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
    weights = (1.0 / masked_of_crop).expand_as(masks)[masks]  # [M]
    rows = max(1, CHUNK // student.shape[1])
    if len(student) <= rows:
        return _weighted(student, teacher, weights, temperature) / len(masks)
    chunks = zip(student.split(rows), teacher.split(rows), weights.split(rows), strict=True)
    terms = [
        checkpoint(_weighted, *chunk, temperature, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
    ]
    return torch.stack(terms).sum() / len(masks)


def _weighted(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """The sum of cross-entropy times weight over some rows, a scalar."""
    cross_entropy = -(teacher * F.log_softmax(student.float() / temperature, dim=-1)).sum(dim=-1)
    return torch.sum(cross_entropy * weights)
