"""What is done to models by themselves, without a configuration of a whole run: train, prune, export.

Training and pruning alone are the stages of a run, in a store of their own: the folder that the results go to.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodeset.infra.apart import apart
from lodeset.infra.config import usable_cpus
from lodeset.infra.session import run_in
from lodeset.pipeline import own
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.shown import shown

if TYPE_CHECKING:
    from lodeset.pipeline.config import TargetSet
    from lodeset.pipeline.dag.runner import Event
    from lodeset.pipeline.dag.stage import Context, Outcome, Stage
    from lodeset.pipeline.dag.store import Artifact
    from lodeset.pruning.config import Job
    from lodeset.pruning.specs import Dense
    from lodeset.training.config import TrainingConfig
    from lodeset.training.index import Shards

REPORT, PAGE = "report.json", "report.html"


def _unwatched(event: Event) -> None:
    """Nobody asked how far it is."""


def train(
    shards: Sequence[str],
    folder: str | Path,
    config: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    ray_address: str = "local",
    cpus: int | None = None,
    watch: Callable[[Event], None] = _unwatched,
) -> dict[str, dict[str, Any]]:
    """Trains on images that are there already: lodeset's shards (`index.parquet`), any WebDataset, or folders of images.

    `config` is a file with the keys of `training`; without it, and where it says nothing, the recipe's values hold. Returns
    each run's summary.

    Raises:
        ConfigError: the configuration names no such key, or a value that cannot be.
        LodesetError: no images there, or a run failed.
        HeldError: another run trains into this folder.
    """
    from lodeset.pipeline.config import load
    from lodeset.training.config import TrainingConfig, identity_of
    from lodeset.training.webdataset import shards_of

    settings, target = load(TrainingConfig, config, overrides), Path(folder).resolve()
    if settings.mix:
        raise ConfigError("mix weighs curated sets, and shards alone do not say which set wants what: remove it")
    if settings.weights is not None:
        from lodeset.training.weights import check_weights  # loads torch

        check_weights(settings.weights.path, settings.model)  # now, not when all tars have been read
    if (target / "train").is_dir():
        from lodeset.training.checkpoint import check_settings

        check_settings(target / "train", identity_of(settings))  # likewise
    own.mark(target, "run")
    found = shards_of(shards, target / "index")
    return train_on(settings, found, target, cpus=cpus or usable_cpus(), ray_address=ray_address, watch=watch)


def train_on(
    config: TrainingConfig,
    shards: Shards,
    folder: Path,
    *,
    cpus: int,
    ray_address: str = "local",
    watch: Callable[[Event], None] = _unwatched,
) -> dict[str, dict[str, Any]]:
    """Trains into `folder/train`, `finish` and `distill`, as far as configured; a run that was stopped goes on."""
    from lodeset.pipeline.dag.cluster import Cluster
    from lodeset.pipeline.dag.store import Store
    from lodeset.training.graph import alone

    written = _given_shards(shards)
    stages = alone(config, written.stage, shards.index)
    made = run_in(
        Store(str(folder)),
        stages,
        name="training",
        cpus=cpus,
        ray=Cluster(ray_address),
        watch=watch,
        given={written.stage.id: written.artifact},
    )
    return {stage.name: {**made[id_].details, "folder": str(folder / stage.name)} for id_, stage in stages.items()}


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
    watch: Callable[[Event], None] = _unwatched,
) -> dict[str, Any]:
    """Prunes the model in a folder, calibrated on images of shards; returns the job's report.

    `config` is a file with the keys of one job of `pruning`. `target`: where labeled images lie, with the metadata fields
    `label` and `split` (gallery or test).

    Raises:
        ConfigError: the configuration names no such key, or a value that cannot be.
        LodesetError: no model or no images there, or the job cannot be done.
        HeldError: another job prunes into this folder.
    """
    from lodeset.pipeline.config import TargetSet, load, resolve
    from lodeset.pruning.config import METHODS, WhichMethod
    from lodeset.training.webdataset import shards_of

    method = load(WhichMethod, config, overrides).method
    job, out, source = load(METHODS[method], config, overrides), Path(folder).resolve(), Path(model).resolve()
    if job.checkpoint != "train":
        raise ConfigError(f"checkpoint {job.checkpoint} names a stage of a run, and here the model is given: remove it")
    if not source.is_dir():
        raise LodesetError(f"{source} is not a folder: give the one in which model.safetensors lies")
    judged = None if target is None else TargetSet(name="target", uri=resolve(target, Path.cwd()))
    dense, identity = apart(dense_of, source, size)  # now, not when all images have been read
    own.mark(out, "run")
    found = shards_of(shards, out / "index")
    cores = cpus or usable_cpus()
    return prune_on(dense, identity, found, out, job, judged, cpus=cores, ray_address=ray_address, watch=watch)


def prune_on(
    dense: Dense,
    identity: str,
    shards: Shards,
    folder: Path,
    job: Job,
    target: TargetSet | None,
    *,
    cpus: int,
    ray_address: str = "local",
    watch: Callable[[Event], None] = _unwatched,
) -> dict[str, Any]:
    """Prunes into `folder`: models under `models/`, `report.json`, which is returned, and a page. A job that was stopped goes on.

    `identity` is the digest of the model's files.
    """
    from lodeset.infra.report.render import write_pruned
    from lodeset.pipeline.config import Ingest, Resources
    from lodeset.pipeline.dag.cluster import Cluster
    from lodeset.pipeline.dag.stage import read_as
    from lodeset.pipeline.dag.store import Store
    from lodeset.pipeline.graph import ingest_stage
    from lodeset.pruning.graph import alone
    from lodeset.pruning.specs import PruneDetails

    model, written, store = _given("train", 0, identity), _given_shards(shards), Store(str(folder))
    stages: dict[str, Stage] = {}
    labeled = None
    if target is not None:
        labeled = ingest_stage(Ingest(), Resources().beam, target.name, (target,))
        stages[labeled.id] = labeled
    stage = alone(job, replace(dense, index=shards.index), model.stage, written.stage, labeled, target)
    stages[stage.id] = stage
    given = {one.stage.id: one.artifact for one in (model, written)}
    made = run_in(store, stages, name="pruning", cpus=cpus, ray=Cluster(ray_address), watch=watch, given=given)
    (report,) = read_as(PruneDetails, made[stage.id].details).jobs
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    write_pruned(report, store.read, folder / PAGE, f"{Path(dense.folder).name}, pruned")
    return dict(report)


def dense_of(model: Path, size: int | None) -> tuple[Dense, str]:
    """What a job needs to know of a model that lies in a folder, and the digest of its files. Loads torch.

    Raises:
        LodesetError: there is no model, or neither it nor `size` says how large its images are.
    """
    from lodeset.pipeline.config import Ingest
    from lodeset.pruning.formats.saving import digest_of, load_model
    from lodeset.pruning.specs import Dense
    from lodeset.training.config import CropsConfig
    from lodeset.training.origin import finished

    loaded = load_model(model)
    side = getattr(loaded, "image_size", None) if size is None else size
    if side is None:
        raise LodesetError(f"{model} does not say how large its images are: give --size")
    checkpoint = finished(model)
    of = None if checkpoint is None else checkpoint.of
    crops, most = (CropsConfig(), Ingest().max_pixels) if of is None else (of.crops, of.max_pixels)
    dense = Dense(folder=str(model), index=(), size=side, max_pixels=most, crops=crops, checkpoint=checkpoint)
    return dense, digest_of(model)


@dataclass(frozen=True)
class _Given:
    """What stages are made from although no stage of the store made it."""

    stage: Stage
    artifact: Artifact


def _given(name: str, images: int, fingerprint: str, content: Mapping[str, str] | None = None) -> _Given:
    from lodeset.pipeline.dag.stage import Stage
    from lodeset.pipeline.dag.store import Artifact, File, Rows

    def never(context: Context) -> Outcome:
        raise AssertionError(f"{context.stage.id} is given")

    tables: dict[str, tuple[File, ...]] = {"index": (), "model": ()}
    artifact = Artifact(name, "all", 0, fingerprint, {}, {}, tables, Rows(images, images), content or {})
    return _Given(Stage(name, "all", 0, "ray", never, {}), artifact)


def _given_shards(shards: Shards) -> _Given:
    from lodeset.pipeline.specs import SHARDS
    from lodeset.training.index import open_index

    index = open_index(shards.index)
    return _given("write_shards", len(index), index.digest(), {SHARDS: index.digest()})


@contextlib.contextmanager
def _on_this_machine(folder: str) -> Iterator[Path]:
    """A model's folder, or a copy of it if it is the URL of one.

    Raises:
        LodesetError: nothing answers at that URL, or there is no model.
    """
    if "://" not in folder:
        yield Path(folder)
        return
    from lodeset.pipeline.dag.place import Place
    from lodeset.pruning.formats.saving import FORMS
    from lodeset.training.export import WEIGHTS

    place = Place(folder)
    with tempfile.TemporaryDirectory(prefix="lodeset-model-") as copy:
        for name in (WEIGHTS, *FORMS):
            data = place.read(name)
            if data is not None:
                Path(copy, name).write_bytes(data)
        if not any(Path(copy).iterdir()):
            raise LodesetError(f"{shown(folder)} holds no model: give the folder in which model.safetensors lies")
        yield Path(copy)


def export(folder: str | Path, path: str | Path, size: int | None = None) -> dict[str, Any]:
    """Writes the model in `folder` (a path or a URL), trained or pruned (see `pruning.saving.load_model`), as an ONNX network for images of
    `size` pixels.

    `size` is by default the side that a transformer's positions are for. Returns path, size and bytes, whether other sizes can be given
    (`any_size`), and of a transformer dim.

    Raises:
        LodesetError: no model there, a size that is no multiple of the patch, or the `onnx` extra is not installed.
    """
    from lodeset.pruning.formats.saving import load_model
    from lodeset.training.onnx import export_onnx
    from lodeset.training.vit import DinoVisionTransformer

    target = Path(path)
    with _on_this_machine(str(folder)) as here:
        model = load_model(here)
    side = model.image_size if size is None and isinstance(model, DinoVisionTransformer) else size
    if side is None:
        raise LodesetError(f"{folder} does not say how large its images are: give --size")
    try:
        free = export_onnx(model, target, side)
    except OSError as error:
        raise LodesetError(f"cannot write {target}: {error.strerror or error}") from error
    told: dict[str, Any] = {"path": str(target), "size": side, "any_size": free, "size_bytes": target.stat().st_size}
    return told | ({"dim": model.config.dim} if isinstance(model, DinoVisionTransformer) else {})
