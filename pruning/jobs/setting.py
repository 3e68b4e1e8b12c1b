"""What every worker of a pruning job needs: a model, images to measure on, and labeled sets to judge it on."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context
from lodeset.pipeline.dag.store import File, Part, Store
from lodeset.pipeline.dag.stored import Stored
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.config import PruneJob
from lodeset.pruning.formats.saving import load_model
from lodeset.pruning.jobs.judging import knn_of
from lodeset.pruning.specs import PruneSpec
from lodeset.pruning.units.folding import folded
from lodeset.pruning.units.groups import Group, find_groups, taken_by
from lodeset.training.config import CropsConfig
from lodeset.training.evaluate import centre_square
from lodeset.training.index import ShardIndex
from lodeset.training.labelled import Target
from lodeset.training.origin import Origin
from lodeset.training.vit import DinoVisionTransformer

VERSION = PruneSpec.VERSION
DENSE = "prune_dense"

# Distributes items over workers, which make parts of them; each worker calls the first argument once.
Share = Callable[[Callable[[], Callable[[Any], Part]], Iterable[Any]], Iterator[Part]]


@dataclass(frozen=True)
class Setting:
    """What every worker of a stage needs."""

    store: Store
    dense: Stored
    index: tuple[str, ...]  # of the shards that the calibration images are in
    size: int
    calibration_max_pixels: int  # calibration skips the images that training skipped
    target_max_pixels: int
    targets: tuple[Target, ...]
    folder: str  # of the pruned models, relative to the store
    crops: CropsConfig  # crops that the model was trained with
    trained: Origin | None = None  # the last checkpoint of its run

    def stored(self) -> nn.Module:
        """The dense model as stored."""
        torch.set_num_threads(1)
        with self.dense.here() as folder:
            model = load_model(folder)
        taken_by(model, self.example())  # reports a wrong image size now
        return model

    def model(self) -> nn.Module:
        """The dense model; in networks other than lodeset's, BatchNorms are folded into their convolutions."""
        model = self.stored()
        return model if isinstance(model, DinoVisionTransformer) else folded(model, self.example())

    def target(self, name: str | None) -> Target:
        """The target set with this name, or the first one.

        Raises:
            LodesetError: there is no such target set.
        """
        matches = [target for target in self.targets if name in (None, target.name)]
        if not matches:
            existing = ", ".join(target.name for target in self.targets) or "none"
            raise LodesetError(
                f"no target set {'' if name is None else name + ' '}with labels to train on (existing: {existing}); "
                "`lodeset prune` takes one as --target"
            )
        return matches[0]

    def views(self, crops: CropsConfig | None) -> CropsConfig:
        """Crop settings of the two views of an image, at the model's size; by default those of the model's training."""
        size = {"global_size": self.size, "local_count": 0, "distort": "loader"}
        return CropsConfig.model_validate((crops or self.crops).model_dump() | size)

    def knn(self, model: nn.Module) -> dict[str, dict[str, float]]:
        return knn_of(model, self.targets, self.size, self.target_max_pixels)

    def example(self) -> torch.Tensor:
        """Two images of noise, to trace models with and to compare them on."""
        return torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def pixels(self, index: ShardIndex, rows: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The readable images of these rows of the index: the center square, [size, size, 3]."""
        squares = []
        for data in index.read(rows):
            try:
                image = decode(data or b"", self.calibration_max_pixels)
            except Unreadable:
                continue
            squares.append(centre_square(np.asarray(image), self.size))
        return squares

    def groups(self, model: nn.Module, job: PruneJob) -> tuple[tuple[Group, ...], dict[str, str]]:
        """The groups that the job prunes, and the reasons why the others are left whole.

        Raises:
            LodesetError: the model has nothing of the kinds that the job is to prune.
        """
        groups_found = find_groups(model, self.example())
        wanted = {
            "heads": [g for g in groups_found.prunable if g.heads],
            "units": [g for g in groups_found.prunable if not g.heads],
        }
        skipped = dict(groups_found.skipped)
        for kind, groups in wanted.items():
            if kind not in job.targets:
                skipped |= {group.name: f"targets are {', '.join(job.targets)}" for group in groups}
        chosen = tuple(g for g in groups_found.prunable if any(g in wanted[kind] for kind in job.targets))
        if not chosen:
            raise LodesetError(f"the model has none of the targets ({', '.join(job.targets)}): {skipped}")
        return chosen, skipped


def judging_inputs(setting: Setting) -> list[Any]:
    """Everything that the evaluation of a variant depends on."""
    return [[t.name, list(t.ids), list(t.labels), list(t.splits)] for t in setting.targets]


@dataclass(frozen=True)
class Workplace:
    """Where a job is done; `basis` identifies the model and the images."""

    context: Context
    setting: Setting
    share: Share
    basis: tuple[str, str]

    def once(self, stage: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `make`, computed once and kept as JSON."""
        store = self.context.store
        part = store.part(stage, key)
        if part is None:
            file = kept_file(store, stage, key, "found.json", json.dumps(make()).encode())
            part = store.commit_part(stage, key, {}, {"images": 0}, files={"found": file})
        return dict(json.loads(store.bytes_of(part.files["found"])))

    def knn_dense(self) -> dict[str, dict[str, float]]:
        """kNN accuracy of the dense model, computed once for all jobs on it."""
        key = digest(DENSE, VERSION, self.basis[0], self.setting.size, judging_inputs(self.setting))
        return self.once(DENSE, key, lambda: self.setting.knn(self.setting.model()))


def kept_file(store: Store, stage: str, key: str, name: str, data: bytes, rows: int = 1) -> File:
    """A file of a part that is about to be committed."""
    relative = f"parts/{stage}/{key}/{uuid.uuid4().hex[:12]}-{name}"
    with store.writing(relative) as sink:
        sink.write(data)
    return File(relative, rows, sink.size_bytes, sink.sha256())


@dataclass(frozen=True)
class Done:
    """The result of a job: its report, the models' files, the number of its parts, and how many of them this run
    made.
    """

    report: dict[str, Any]
    models: list[File]
    parts: int
    parts_made: int
