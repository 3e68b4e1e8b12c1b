"""What a run starts from: nothing, the weights of a backbone, or an earlier run's networks, dense or pruned, to
continue with or to learn from.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from lodeset.pipeline.config import Strict
from lodeset.pipeline.dag.fingerprint import file_digest
from lodeset.pipeline.dag.stored import Stored
from lodeset.pipeline.errors import LodesetError
from lodeset.training.backbone import Backbone
from lodeset.training.checkpoint import MARKER, Marker, check_checkpoint, newest_step, read_checkpoint
from lodeset.training.config import TrainingConfig
from lodeset.training.narrow import heads_of, load_narrow, narrow
from lodeset.training.ssl import Network, Networks, fresh
from lodeset.training.vit import DinoVisionTransformer
from lodeset.training.weights import load_weights

POSITIONS = "backbone.pos_embed"


class Origin(Strict):
    """Networks that a run starts from.

    path: weights of a backbone (see `load_weights`), or the folder of an earlier run's checkpoint.
    digest: of these bytes; checkpoints of the new run depend on it.
    of: the configuration of the earlier run; None for a backbone alone.
    distil: the earlier teacher is frozen, and another student learns from it (DINOv2, section 5, "model distillation").
    pruned: folder of the pruned backbone (see `load_narrow`) that continues, with the heads of the teacher.
    checkpoint, pruned_model: the files in these folders, if they are in a remote store.
    """

    path: str
    digest: str
    of: TrainingConfig | None = None
    distil: bool = False
    pruned: str | None = None
    checkpoint: Stored | None = None
    pruned_model: Stored | None = None

    @property
    def at(self) -> Stored:
        """The folder of the checkpoint."""
        return self.checkpoint or Stored(folder=self.path)

    @property
    def pruned_at(self) -> Stored | None:
        if self.pruned_model is None and self.pruned is not None:
            return Stored(folder=self.pruned)
        return self.pruned_model


def finished(folder: Path) -> Origin | None:
    """The last checkpoint of a run that ended in `folder`, as recorded there; None if there is none."""
    path = folder / f"step-{newest_step(folder):07d}"
    try:
        marker = Marker.model_validate_json((path / MARKER).read_bytes())
        of = TrainingConfig.model_validate(marker.config or marker.identity["training"])
    except (OSError, KeyError, ValidationError):
        return None
    return Origin(path=str(path), digest=file_digest(str(path / MARKER)), of=of) if marker.step == of.steps else None


def networks(config: TrainingConfig, origin: Origin | None) -> Networks:
    """The networks of a run's first step.

    Raises:
        LodesetError: the origin does not exist, cannot be read, or has another architecture.
    """
    nets = fresh(config)
    if origin is None:
        return nets
    if origin.of is None:
        backbone = load_weights(origin.path, config.model)
        nets.student.backbone = copy.deepcopy(backbone).train()
        if nets.averages:
            nets.average.backbone = backbone.requires_grad_(False)
        return nets
    with origin.at.here() as folder:
        check_checkpoint(folder)
        return _continued(nets, config, origin, origin.of, folder)


def _continued(nets: Networks, config: TrainingConfig, origin: Origin, of: TrainingConfig, folder: Path) -> Networks:
    """The networks with what the earlier run's checkpoint in `folder` holds."""
    for name, module in nets.buffers.named_children():
        _fill(module, read_checkpoint(folder, f"{name}."))
    teacher = read_checkpoint(folder, "teacher.")
    if origin.pruned_at is not None:
        with origin.pruned_at.here() as model_folder:
            pruned = _pruned_backbone(model_folder)
        heads = {name: tensor for name, tensor in teacher.items() if not name.startswith("backbone.")}
        state = heads | {f"backbone.{name}": tensor for name, tensor in pruned.state_dict().items()}
        for network, trains in ((nets.student, True), (nets.average, False)):
            backbone = DinoVisionTransformer(
                config.model, pruned.image_size
            )  # positions stay on the grid that they are stored for
            narrow(backbone, heads_of(pruned), pruned.state_dict())
            network.backbone = backbone.train(trains).requires_grad_(trains)
            _fill(network, state)
    if origin.distil:
        return replace(nets, teacher=_as_stored(of, teacher))
    if origin.pruned_at is not None:
        return nets
    _fill(nets.student, _fitted(nets.student.backbone, read_checkpoint(folder, "student.")))
    if nets.averages:
        _fill(nets.average, _fitted(nets.average.backbone, teacher))
    return nets


def _pruned_backbone(folder: Path) -> DinoVisionTransformer:
    try:
        return load_narrow(folder)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise LodesetError(
            f"{folder} does not hold a pruned transformer: {error}: remove the pruning results there, and prune again"
        ) from error


@torch.no_grad()
def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module; tied heads are stored under one of their names."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        tensor.copy_(tensors[name])


def _as_stored(config: TrainingConfig, state: Mapping[str, Tensor]) -> Network:
    """A frozen network with the positions of its state; for released weights their grid is larger than that of the
    crops.
    """
    network = Network(config)
    side = round((state[POSITIONS].shape[1] - 1) ** 0.5)
    network.backbone = DinoVisionTransformer(config.model, side * config.model.patch_size)
    _fill(network, state)
    return network.requires_grad_(False).eval()


def _fitted(backbone: Backbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors for a backbone of another image size: a transformer's positions are interpolated to its grid."""
    if not isinstance(backbone, DinoVisionTransformer):
        return dict(state)
    side = backbone.image_size // backbone.config.patch_size
    return {**state, POSITIONS: backbone.interpolated(state[POSITIONS], side, side)}
