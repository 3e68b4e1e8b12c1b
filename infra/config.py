"""The whole configuration file: curation, training, pruning."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from pipeline.config import CurationConfig, load
from pruning.config import PruneJob
from training.config import TrainingConfig


class Config(CurationConfig):
    """Everything a run is made of. Without `training`, a run ends with the shards."""

    training: TrainingConfig | None = Field(None, description="DINOv2 pretraining on the shards; absent: curation only")
    pruning: tuple[PruneJob, ...] = Field((), description="sparsification jobs on the trained model")

    @model_validator(mode="after")
    def _prune_what_is_trained(self) -> Config:
        if self.pruning and self.training is None:
            raise ValueError("pruning: needs a trained model: add `training: {recipe: tiny}`, or remove `pruning`")
        return self


def read(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Raises ConfigError: names the key, the value and what is allowed."""
    return load(Config, path, overrides)
