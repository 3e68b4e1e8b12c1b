"""Image-level term (Caron et al. 2021, arXiv:2104.14294; DINOv2, section 4).

Shapes: V student views, U teacher views, B images, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dino_loss(student: Tensor, teacher: Tensor, temperature: float, skip_same_view: bool) -> Tensor:
    """Sum over pairs of views of the mean cross-entropy between teacher and student, a scalar.

    student: scores [V, B, K]; teacher: probabilities [U, B, K]. `skip_same_view` leaves out the pairs (i, i) (a global
    crop does not predict itself).
    """
    log_probabilities = F.log_softmax(student.float() / temperature, dim=-1)
    pairs = -torch.einsum("ubk,vbk->uv", teacher, log_probabilities) / student.shape[1]  # [U, V]
    if skip_same_view:
        pairs = pairs.fill_diagonal_(0)
    return pairs.sum()
