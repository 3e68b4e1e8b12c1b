"""Train pruned and refitted models of any kind to match the dense model's first output, without labels and without the
heads of a training run.
"""

from __future__ import annotations

import functools
import json
import math
import posixpath
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lodeset.pipeline.dag.store import Part
from lodeset.pipeline.dag.stored import Stored
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.config import RecoverConfig
from lodeset.pruning.formats.saving import load_model, save_pruned
from lodeset.pruning.jobs.setting import Setting, kept_file
from lodeset.pruning.jobs.sweep_parts import publish
from lodeset.pruning.learning.examples import Batches, Examples, Images
from lodeset.pruning.learning.loop import NotLearnedError, Recipe, descend
from lodeset.pruning.learning.tasks import Outputs, features_of
from lodeset.pruning.learning.whitening import COLUMNS, DAMPING, POSITIONS, ROWS, whitened
from lodeset.training.index import open_index

TRAINED, HOW = "prune_recovered", "distilled by outputs"
BATCH, BASE_LR, WARMUP = 64, 4e-4, 0.1
MEASURED = 2_048  # number of views on which the basis is measured


@dataclass(frozen=True)
class SelectedImages:
    """A subset of the images, given by their rows."""

    images: Images
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> list[bytes | None]:
        return self.images.read(self.rows[list(rows)].tolist())


def towards(dense: nn.Module, model: nn.Module, batches: Batches, recipe: Recipe) -> float:
    """Train `model` in place to return what `dense` returns first, with AdamW on all of its parameters; return the mean
    loss of the last steps.

    The model stays in evaluation mode: dropout would add noise that the teacher never has, and norms that are not
    folded into a convolution keep the statistics that the dense model is judged with. Weights are trained in a basis in
    which the layers' inputs in the first steps are white (`pruning/learning/whitening.py`).

    Raises:
        NotLearnedError: the loss is not finite.
        LodesetError: too few images can be read.
    """
    model.eval().requires_grad_(True)
    with whitened(model, _first(batches, recipe.steps), recipe.seed):
        optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        features, steps = functools.partial(features_of, model), range(recipe.steps)
        return descend(Outputs(dense), features, batches, optimiser, recipe, steps, lambda _: None)


def _first(batches: Batches, steps: int) -> Iterator[Tensor]:
    """The views of the first steps, as many as are needed to measure the layers' inputs."""
    seen = 0
    for step in range(steps):
        images = batches.at(step)[0].flatten(0, 1)
        yield images
        seen += len(images)
        if seen >= MEASURED:
            return


def _rates(recover: RecoverConfig) -> tuple[int, float]:
    """Images per step, and the learning rate at batch 1024."""
    return recover.batch or BATCH, recover.base_lr or BASE_LR


def distillation_inputs(setting: Setting, recover: RecoverConfig, seed: int, compared: Sequence[int]) -> list[Any]:
    """Everything that a distillation depends on besides the two models and the images."""
    crops = setting.views(recover.crops).model_dump()
    batch, base_lr = _rates(recover)
    basis = MEASURED, POSITIONS, DAMPING, ROWS, COLUMNS
    return [HOW, basis, recover.steps, batch, base_lr, crops, setting.calibration_max_pixels, seed, list(compared)]


def distiller(
    setting: Setting, recover: RecoverConfig, seed: int, compared: Sequence[int], number: int
) -> Callable[[tuple[str, dict[str, Any], Stored]], Part]:
    """Distill pruned models on two views of every image except those that models are compared on; a stopped one starts
    again.
    """
    store, dense, index = setting.store, setting.model(), open_index(setting.index)
    batch, base_lr = _rates(recover)
    images = SelectedImages(index, np.setdiff1d(np.arange(len(index)), np.asarray(compared, np.int64)))
    crops, limit = setting.views(recover.crops), setting.calibration_max_pixels
    examples = Examples(images, None, crops, batch, seed, limit)
    recipe = Recipe(recover.steps, base_lr * math.sqrt(batch / 1024), 0.0, WARMUP, seed)

    def distil(item: tuple[str, dict[str, Any], Stored]) -> Part:
        key, row, pruned = item
        started = time.time()
        with pruned.here() as folder:
            model = load_model(folder)
        try:
            loss = towards(dense, model, examples, recipe)
        except NotLearnedError as error:
            raise LodesetError(
                f"recover: the model pruned by {row['method']} could not be distilled ({error}): lower recover.base_lr "
                f"({base_lr:g}); if the dense model's outputs are the same for all images, there is nothing to learn"
            ) from error
        stem = posixpath.basename(str(row["model"])).rpartition("-")[0]
        name = f"{setting.folder}/job-{number}/{stem}-distilled-{key[:8]}"
        files = publish(store, name, functools.partial(save_pruned, model, example=setting.example()))
        seen = recipe.steps * min(batch, len(images))
        run = {"steps": recipe.steps, "images_seen": seen, "losses": {"outputs": loss}, "how": HOW, "model": name}
        files["summary"] = kept_file(store, TRAINED, key, "summary.json", json.dumps(run).encode())
        return store.commit_part(TRAINED, key, {}, {"images": 0}, time.time() - started, files=files)

    return distil
