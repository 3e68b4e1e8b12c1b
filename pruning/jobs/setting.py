"""What every worker of a pruning job needs: a model, images to look at, and labelled sets to judge it on."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode
from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context
from lodeset.pipeline.dag.store import File, Part, Store
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

# Has workers make parts of items; each worker calls the first argument once.
Share = Callable[[Callable[[], Callable[[Any], Part]], Iterable[Any]], Iterator[Part]]


@dataclass(frozen=True)
class Setting:
    """What every worker of a stage needs."""

    store: Store
    model_folder: str
    index: tuple[str, ...]  # of the shards that calibration images come from
    size: int
    calibration_max_pixels: int  # what training skipped, calibration skips
    target_max_pixels: int
    targets: tuple[Target, ...]
    folder: str  # of the pruned models, relative to the store
    crops: CropsConfig  # what the model was trained with
    trained: Origin | None = None  # its run's last checkpoint

    def stored(self) -> nn.Module:
        """The dense model as it is."""
        torch.set_num_threads(1)
        model = load_model(Path(self.model_folder))
        taken_by(model, self.example())  # says now what is wrong
        return model

    def model(self) -> nn.Module:
        """The dense model; of networks that are not lodeset's, BatchNorms are part of their convolutions."""
        model = self.stored()
        return model if isinstance(model, DinoVisionTransformer) else folded(model, self.example())

    def target(self, name: str | None) -> Target:
        """The target set of this name, or the first.

        Raises:
            LodesetError: there is none.
        """
        found = [target for target in self.targets if name in (None, target.name)]
        if not found:
            there = ", ".join(target.name for target in self.targets) or "none"
            raise LodesetError(
                f"no target set {'' if name is None else name + ' '}with labels to train on (there: {there}); `lodeset prune` takes one as --target"
            )
        return found[0]

    def views(self, crops: CropsConfig | None) -> CropsConfig:
        """How two views of an image are taken, at the model's size; by default as the model was trained."""
        size = {"global_size": self.size, "local_count": 0, "distort": "loader"}
        return CropsConfig.model_validate((crops or self.crops).model_dump() | size)

    def knn(self, model: nn.Module) -> dict[str, dict[str, float]]:
        return knn_of(model, self.targets, self.size, self.target_max_pixels)

    def example(self) -> torch.Tensor:
        """Two images of noise, to trace models with and to compare them on."""
        return torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def pixels(self, index: ShardIndex, rows: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The images of these rows of the index that can be read: the centre square, [size, size, 3]."""
        found = []
        for data in index.read(rows):
            try:
                image = decode(data or b"", self.calibration_max_pixels)
            except Unreadable:
                continue
            found.append(centre_square(np.asarray(image), self.size))
        return found

    def groups(self, model: nn.Module, job: PruneJob) -> tuple[tuple[Group, ...], dict[str, str]]:
        """What the job prunes, and why the rest is left whole.

        Raises:
            LodesetError: nothing of what the job is to prune is there.
        """
        found = find_groups(model, self.example())
        wanted = {"heads": [g for g in found.prunable if g.heads], "units": [g for g in found.prunable if not g.heads]}
        skipped = dict(found.skipped)
        for kind, groups in wanted.items():
            if kind not in job.targets:
                skipped |= {group.name: f"targets are {', '.join(job.targets)}" for group in groups}
        chosen = tuple(g for g in found.prunable if any(g in wanted[kind] for kind in job.targets))
        if not chosen:
            raise LodesetError(f"the model has none of what targets asks for ({', '.join(job.targets)}): {skipped}")
        return chosen, skipped


def told(setting: Setting) -> list[Any]:
    """What the evaluation of a variant depends on."""
    return [[t.name, list(t.ids), list(t.labels), list(t.splits)] for t in setting.targets]


@dataclass(frozen=True)
class Workplace:
    """Where a job is done; `basis` is which model on which images."""

    context: Context
    setting: Setting
    share: Share
    basis: tuple[str, str]

    def once(self, stage: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, made once and kept as JSON."""
        store = self.context.store
        found = store.part(stage, key)
        if found is None:
            file = kept_file(store, stage, key, "found.json", json.dumps(make()).encode())
            found = store.commit_part(stage, key, {}, {"images": 0}, files={"found": file})
        return dict(json.loads(store.bytes_of(found.files["found"])))

    def knn_dense(self) -> dict[str, dict[str, float]]:
        """Of the dense model: once for all jobs on it."""
        key = digest(DENSE, VERSION, self.basis[0], self.setting.size, told(self.setting))
        return self.once(DENSE, key, lambda: self.setting.knn(self.setting.model()))


def kept_file(store: Store, stage: str, key: str, name: str, data: bytes, rows: int = 1) -> File:
    """A file of a part that is about to be committed."""
    relative = f"parts/{stage}/{key}/{uuid.uuid4().hex[:12]}-{name}"
    with store.writing(relative) as sink:
        sink.write(data)
    return File(relative, rows, sink.size_bytes, sink.sha256())


@dataclass(frozen=True)
class Done:
    """What a job left: its report, the models' files, how many parts it is of, and how many of these this run made."""

    report: dict[str, Any]
    models: list[File]
    parts: int
    parts_made: int
