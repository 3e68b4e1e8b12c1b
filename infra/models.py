"""What is done to models by themselves, without a configuration of a whole run: train, prune, export."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodeset.infra.apart import apart
from lodeset.infra.config import usable_cpus
from lodeset.pipeline import own
from lodeset.pipeline.errors import ConfigError, LodesetError

LOG, PAGE = "log.txt", "report.html"

if TYPE_CHECKING:
    from lodeset.pipeline.config import TargetSet
    from lodeset.pruning.config import Job
    from lodeset.training.config import TrainingConfig
    from lodeset.training.index import Shards


def train(
    shards: Sequence[str],
    folder: str | Path,
    config: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    ray_address: str = "local",
    cpus: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains on images that are there already: lodeset's shards (`index.parquet`), any WebDataset, or folders of images.

    `config` is a file with the keys of `training`; without it, and where it says nothing, the recipe's values hold. Returns each run's summary.

    Raises:
        ConfigError: the configuration names no such key, or a value that cannot be.
        LodesetError: no images there, or a run failed.
    """
    from lodeset.pipeline.config import load
    from lodeset.training.config import TrainingConfig
    from lodeset.training.webdataset import shards_of

    settings, target = load(TrainingConfig, config, overrides), Path(folder).resolve()
    if settings.mix:
        raise ConfigError("mix weighs curated sets, and shards alone do not say which set wants what: remove it")
    if settings.weights is not None:
        from lodeset.training.weights import check_weights  # loads torch

        check_weights(settings.weights.path, settings.model)  # now, not when all tars have been read
    if (target / "train").is_dir():
        from lodeset.training.checkpoint import check_settings
        from lodeset.training.config import identity_of

        check_settings(target / "train", identity_of(settings))  # likewise
    own.mark(target, "run")
    found = shards_of(shards, target / "index")
    # A process of its own, as each stage of a run: Ray reads the token of its cluster when it is imported, once a process.
    return apart(_train, settings, found, target, ray_address, cpus or usable_cpus())


def _train(
    config: TrainingConfig, shards: Shards, folder: Path, ray_address: str, cpus: int
) -> dict[str, dict[str, Any]]:
    from lodeset.pipeline.engines.ray import cluster, job
    from lodeset.training.standalone import train

    with cluster(ray_address, cpus) as address, job(address):
        return train(config, shards, folder, cpus)


def prune(
    model: str | Path,
    folder: str | Path,
    shards: Sequence[str],
    config: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    size: int | None = None,
    target: str | None = None,
    ray_address: str = "local",
    cpus: int | None = None,
) -> dict[str, Any]:
    """Prunes the model in a folder, calibrated on images of shards; the job's report (see `pruning.byhand.prune`).

    `config` is a file with the keys of one job of `pruning`. `target`: where labelled images lie, with the metadata fields `label` and
    `split` (gallery or test).

    Raises:
        ConfigError: the configuration names no such key, or a value that cannot be.
        LodesetError: no model or no images there, or the job cannot be done.
    """
    from lodeset.pipeline.config import TargetSet, load, resolve
    from lodeset.pruning.config import METHODS, WhichMethod
    from lodeset.training.webdataset import shards_of

    method = load(WhichMethod, config, overrides).method
    job, out, source = load(METHODS[method], config, overrides), Path(folder).resolve(), Path(model).resolve()
    if job.checkpoint != "train":
        raise ConfigError(f"checkpoint {job.checkpoint} names a stage of a run, and here the model is given: remove it")
    if not source.is_dir():
        raise LodesetError(f"{source} is no folder: give the one in which model.safetensors lies")
    judged = None if target is None else TargetSet(name="target", uri=resolve(target, Path.cwd()))
    size = apart(_size_of, source, size)  # now, not when all images have been read
    own.mark(out, "run")
    found = shards_of(shards, out / "index")
    return apart(_prune, source, found, out, job, size, judged, ray_address, cpus or usable_cpus())


def _size_of(model: Path, size: int | None) -> int:
    from lodeset.pruning.byhand import size_of

    return size_of(model, size)


def _prune(
    model: Path,
    shards: Shards,
    folder: Path,
    settings: Job,
    size: int,
    target: TargetSet | None,
    ray_address: str,
    cpus: int,
) -> dict[str, Any]:
    from lodeset.infra.report.render import write_pruned
    from lodeset.pipeline.dag.store import Store
    from lodeset.pipeline.engines.ray import cluster
    from lodeset.pruning.byhand import prune

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())  # what Ray and its workers have to say
    with cluster(ray_address, cpus) as address:
        told = prune(model, shards, folder, settings, size, target, cpus, address)
    write_pruned(told, Store(str(folder)).read, folder / PAGE, f"{model.name}, pruned")
    return told


def export(folder: str | Path, path: str | Path, size: int | None = None) -> dict[str, Any]:
    """Writes the model in `folder`, trained or pruned (see `pruning.saving.load_model`), as an ONNX network for images of `size` pixels.

    `size` is by default the side that a transformer's positions are for. Returns path, size and bytes, whether other sizes can be given
    (`any_size`), and of a transformer dim.

    Raises:
        LodesetError: no model there, a size that is no multiple of the patch, or the `onnx` extra is not installed.
    """
    from lodeset.pruning.formats.saving import load_model
    from lodeset.training.onnx import export_onnx
    from lodeset.training.vit import DinoVisionTransformer

    model, target = load_model(Path(folder)), Path(path)
    side = model.image_size if size is None and isinstance(model, DinoVisionTransformer) else size
    if side is None:
        raise LodesetError(f"{folder} does not say how large its images are: give --size")
    try:
        free = export_onnx(model, target, side)
    except OSError as error:
        raise LodesetError(f"cannot write {target}: {error.strerror or error}") from error
    told: dict[str, Any] = {"path": str(target), "size": side, "any_size": free, "size_bytes": target.stat().st_size}
    return told | ({"dim": model.config.dim} if isinstance(model, DinoVisionTransformer) else {})
