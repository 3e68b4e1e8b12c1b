"""What pruning and refit left of a model of any kind, trained again until it gives what the dense model gives: without labels, and without
the heads of a run.
"""

from __future__ import annotations

import functools
import json
import math
import posixpath
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.dag.store import Part
from pruning.config import RecoverConfig
from pruning.examples import Examples
from pruning.learning import Recipe, train
from pruning.masks import everything
from pruning.parts import publish
from pruning.saving import load_model, save_pruned
from pruning.setting import Setting, kept_file
from pruning.tasks import Outputs
from training.config import CropsConfig
from training.index import open_index

TRAINED = "prune_recovered"
BATCH, WARMUP = 64, 0.1


def distiller(
    setting: Setting, recover: RecoverConfig, seed: int, number: int
) -> Callable[[tuple[str, dict[str, Any]]], Part]:
    """Distils pruned models, each on two views of every image; one that was stopped starts again."""
    store, dense = setting.store, setting.model()
    crops = (recover.crops or setting.crops).model_dump()
    size = {"global_size": setting.size, "local_count": 0, "distort": "loader"}
    batch = recover.batch or BATCH
    examples = Examples(
        open_index(setting.index),
        None,
        CropsConfig.model_validate(crops | size),
        batch,
        seed,
        setting.calibration_max_pixels,
    )
    recipe = Recipe(recover.steps, recover.base_lr * math.sqrt(batch / 1024), 0.0, WARMUP, seed)

    def distil(item: tuple[str, dict[str, Any]]) -> Part:
        key, row = item
        started = time.time()
        model = load_model(Path(store.path(str(row["model"])))).requires_grad_(True)
        loss = train(model, Outputs(dense), everything(model), examples, recipe, range(recipe.steps))
        stem = posixpath.basename(str(row["model"])).rpartition("-")[0]
        name = f"{setting.folder}/job-{number}/{stem}-distilled-{key[:8]}"
        files = publish(store, name, functools.partial(save_pruned, model, example=setting.example()))
        seen = recipe.steps * min(batch, len(examples.images))
        run = {
            "steps": recipe.steps,
            "images_seen": seen,
            "losses": {"outputs": loss},
            "how": "distilled",
            "model": name,
        }
        files["summary"] = kept_file(store, TRAINED, key, "summary.json", json.dumps(run).encode())
        return store.commit_part(TRAINED, key, {}, {"images": 0}, time.time() - started, files=files)

    return distil
