"""Kozachenko-Leonenko differential entropy term (Sablayrolles et al. 2018, arXiv:1806.03198; DINOv2, section 4).

Shapes: b rows on this process, B on all of them, D width.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def koleo_loss(features: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """-mean log(distance to the nearest other row) over L2-normalized rows of features [b, D]; a scalar.

    With a process `group` (the same b on each), the B >= 2 rows of all processes are compared, as in the paper ("within
    a batch"), so that the loss does not depend on the number of processes; the authors' code compares the rows of one
    device.
    """
    rows = features if group is None else _all_rows(features.float(), group)
    return -torch.log(nearest_distances(rows) + 1e-8).mean()


def _all_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    every: Tensor = _AllRows.apply(rows, group)  # type: ignore[no-untyped-call]  # torch does not type apply
    return every


class _AllRows(torch.autograd.Function):
    """[b, D] on each of W processes -> [W b, D] on all; each row's gradient is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        every = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, rows.contiguous(), group=group)
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def nearest_distances(features: Tensor) -> Tensor:
    """Euclidean distance [B] of each L2-normalized row of features [B, D] to its nearest other row, in fp32."""
    rows = F.normalize(features.float(), dim=-1)
    with torch.no_grad():
        nearest = (rows @ rows.T).fill_diagonal_(-2.0).argmax(dim=1)
    distances: Tensor = torch.linalg.vector_norm(rows - rows[nearest], dim=1)
    return distances
