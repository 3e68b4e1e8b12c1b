"""The whole configuration file: curation, training, pruning."""

from __future__ import annotations

from pathlib import Path

from fsspec.utils import get_protocol
from pydantic import Field, model_validator

from pipeline.config import CurationConfig, load
from pruning.config import PruneJob
from training.config import TrainingConfig


class Config(CurationConfig):
    """Everything a run is made of. Without `training`, a run ends with the shards."""

    training: TrainingConfig | None = Field(None, description="DINOv2 pretraining on the shards; absent: curation only")
    pruning: tuple[PruneJob, ...] = Field((), description="sparsification jobs on the trained model")

    @model_validator(mode="after")
    def _trains_where_workers_can_write(self) -> Config:
        if self.training is not None and get_protocol(self.store) not in ("file", "local"):
            raise ValueError(
                f"store {self.store}: training writes checkpoints to a file system that all workers mount: "
                "use a path as `store`, or remove `training`"
            )
        return self

    @model_validator(mode="after")
    def _weighs_sets_that_are_there(self) -> Config:
        known = [one.name for one in self.curated]
        for name in self.training.mix if self.training is not None else ():
            if name not in known:
                raise ValueError(
                    f"training.mix.{name}: no curated set has this name: {', '.join(known) or 'there is none'}"
                )
        return self

    @model_validator(mode="after")
    def _prunes_what_is_trained(self) -> Config:
        if not self.pruning:
            return self
        if self.training is None:
            raise ValueError("pruning: needs a trained model: add `training: {recipe: tiny}`, or remove `pruning`")
        model, crops = self.training.model, self.training.crops
        if model.ffn != "mlp":
            raise ValueError(
                f"pruning: removes hidden units of two-layer MLPs, and training.model.ffn {model.ffn} has none: "
                "use `ffn: mlp`, or remove `pruning`"
            )
        tokens = (crops.global_size // model.patch_size) ** 2 + 1 + model.registers
        needed = 4 * model.dim + 2  # a layer's units and the bias, and one position more than these unknowns
        for number, job in enumerate(self.pruning):
            drawn = min(job.positions_per_image or tokens, tokens)
            if job.calibration_images * drawn < needed:
                raise ValueError(
                    f"pruning.{number}.calibration_images {job.calibration_images}: {drawn} positions of each image "
                    f"cannot determine the {4 * model.dim} hidden units of a layer (training.model.dim {model.dim}): "
                    f"use calibration_images {-(-needed // drawn)} or more"
                )
        return self


def read(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Raises ConfigError: names the key, the value and what is allowed."""
    return load(Config, path, overrides)
