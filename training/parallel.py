"""Train models that are too large for one worker: shard them over all workers, and recompute activations."""

import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lodeset.training.backbone import Backbone
from lodeset.training.ssl import Network, Networks
from lodeset.training.vit import Block


def shard(nets: Networks, group: dist.ProcessGroup, device: torch.device, half: bool) -> None:
    """Leave each worker of `group` its share of every network's weights, gradients and moving means (FSDP2).

    The unit that is gathered when it is needed is a block's attention, its feed-forward layer, or a head. `half`:
    weights are gathered as bf16 for bf16 products; stored values, gradients and their sums over workers stay fp32, and
    so do embeddings and norms.
    """
    # Nothing writes into the output of a backbone, so its views are harmless.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = DeviceMesh.from_group(group, device.type)
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32)
    nets.buffers.to(device)
    for network in {id(network): network for network in (nets.student, nets.average, nets.teacher)}.values():
        _shard_network(network, mesh, mixed)


def _shard_network(network: Network, mesh: DeviceMesh, mixed: MixedPrecisionPolicy) -> None:
    for block in blocks_of(network.backbone):
        # The block itself is not a unit: it adds to its input in place, and the input becomes a view once a unit has
        # taken it.
        fully_shard(block.attn, mesh=mesh, mp_policy=mixed)
        fully_shard(block.mlp, mesh=mesh, mp_policy=mixed)
    # By default, outermost units stay gathered until a backward pass, and a teacher has none.
    fully_shard(network.backbone, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(network.backbone, "forward_groups")
    for head in network.heads():
        fully_shard(head, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)


def recompute_activations(network: Network) -> None:
    """Store nothing inside attention and feed-forward layers for the backward pass; recompute it there."""
    for block in blocks_of(network.backbone):
        block.attn.recomputed = block.mlp.recomputed = True


def blocks_of(backbone: Backbone) -> list[Block]:
    """Of a transformer; other backbones are one unit."""
    return [block for block in backbone.modules() if isinstance(block, Block)]
