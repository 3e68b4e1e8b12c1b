"""Estimate the size and duration of a run from its configuration alone: for `plan`, which builds no network.

Shapes: D width, K prototypes.
"""

from lodeset.training.backbones.kind import kind_of
from lodeset.training.config import TrainingConfig

TINY_IMAGES_PER_S = 95.0  # 300 steps of `tiny` at its defaults, 2 CPU cores
BYTES_A_WEIGHT = 4  # fp32
# A checkpoint holds the student, the teacher and two optimizer moments for each of the student's weights.
COPIES_IN_A_CHECKPOINT = 4


def backbone_parameters(config: TrainingConfig) -> int:
    """Weights of the backbone, about."""
    return kind_of(config.network).parameters(config.network, config.crops.global_size)


def head_parameters(config: TrainingConfig) -> int:
    """Number of weights of the projection heads: D -> hidden -> hidden -> bottleneck -> K."""
    heads = config.heads
    bottlenecks = (heads.dino_bottleneck,) if heads.tied else (heads.dino_bottleneck, heads.ibot_bottleneck)
    return sum(
        (config.network.dim + heads.hidden + bottleneck) * heads.hidden + bottleneck * heads.prototypes
        for bottleneck in bottlenecks
    )


def stored_bytes(config: TrainingConfig) -> int:
    """Bytes of the checkpoints that are kept, and of the exported backbone."""
    backbone = backbone_parameters(config)
    kept = min(config.keep_checkpoints, -(-config.steps // config.checkpoint_every))
    checkpoint = COPIES_IN_A_CHECKPOINT * (backbone + head_parameters(config))
    return BYTES_A_WEIGHT * (kept * checkpoint + backbone)


def seconds_per_image(config: TrainingConfig, teacher: TrainingConfig | None = None) -> float:
    """Seconds on 2 CPU cores: the rate of `tiny`, scaled by the multiply-accumulates of the blocks.

    `teacher` is the configuration of another network that is distilled: its forward pass over the global crops counts
    instead of the student's own.
    """
    macs = 3 * _block_macs(config) + _block_macs(teacher or config, local=False)  # forward and backward; forward
    return macs / _macs_a_second()


def forward_seconds(config: TrainingConfig) -> float:
    """Seconds of a forward pass over one image of the size of a global crop, on 2 CPU cores."""
    return _block_macs(config, local=False) / 2 / _macs_a_second()


def _macs_a_second() -> float:
    tiny = TrainingConfig()
    return (3 * _block_macs(tiny) + _block_macs(tiny, local=False)) * TINY_IMAGES_PER_S


def _block_macs(config: TrainingConfig, local: bool = True) -> int:
    """Multiply-accumulates of a forward pass for the crops of one image."""
    crops, kind = config.crops, kind_of(config.network)
    local_macs = crops.local_count * kind.macs(config.network, crops.local_size) if local else 0
    return 2 * kind.macs(config.network, crops.global_size) + local_macs
