"""The whole graph: curation, training, pruning."""

from __future__ import annotations

from lodeset.infra.config import Config
from lodeset.pipeline import graph as curation
from lodeset.pipeline.dag.stage import Stage
from lodeset.pruning import graph as pruning
from lodeset.training import graph as training


def build(config: Config) -> dict[str, Stage]:
    """Every stage of a configuration by id, in topological order.

    Raises:
        LodesetError: a source or a model does not exist.
    """
    stages = curation.build(config)
    max_pixels = config.ingest.max_pixels
    stages |= training.build(config.training, config.targets, stages, max_pixels)
    if config.training is not None:
        stages |= pruning.build(config.pruning, config.targets, stages, max_pixels)
    return stages
