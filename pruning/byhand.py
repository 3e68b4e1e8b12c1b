"""One pruning job without the DAG: a model's folder, images that are there already, a folder for what comes out."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from lodeset.pipeline.config import Ingest, Resources, TargetSet
from lodeset.pipeline.dag.claims import claim
from lodeset.pipeline.dag.stage import Context, Outcome, Progress, Stage
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.graph import ingest_stage
from lodeset.pruning.config import Job
from lodeset.pruning.formats.saving import digest_of, load_model
from lodeset.pruning.jobs.run import run_job
from lodeset.pruning.jobs.setting import VERSION, Setting
from lodeset.training.config import CropsConfig
from lodeset.training.index import Shards, open_index
from lodeset.training.labelled import Target, read_target
from lodeset.training.lines import PROGRESS
from lodeset.training.origin import finished
from lodeset.training.vit import DinoVisionTransformer

REPORT = "report.json"
MOST_PIXELS = Ingest().max_pixels


def prune(
    model: Path,
    shards: Shards,
    folder: Path,
    job: Job,
    size: int | None,
    target: TargetSet | None,
    cpus: int,
    ray_address: str | None,
) -> dict[str, Any]:
    """Prunes into `folder`: models under `models/job-0`, and `report.json`, which is returned. A job that was stopped goes on.

    `target`: labelled images that models are judged on, and that jobs learn labels from. `size`: side of the images that the model
    takes, pixels; by default the one that a transformer's positions are for. Where `model` is the folder of a run that has its last
    checkpoint still, jobs can go on with that run (`recover`), and its augmentation is theirs.

    Raises:
        HeldError: another job prunes into this folder.
        LodesetError: no model there, or the job cannot be done.
    """
    size = size_of(model, size)
    store = Store(str(folder))
    with claim(store, "prune", f"a pruning job in {folder}"):
        targets = () if target is None else (read_labelled(store, target, cpus),)
        trained = finished(model)
        of = None if trained is None else trained.of
        crops, limit = (CropsConfig(), MOST_PIXELS) if of is None else (of.crops, of.max_pixels)
        setting = Setting(store, str(model), shards.index, size, limit, MOST_PIXELS, targets, "models", crops, trained)
        basis = (digest_of(model), open_index(shards.index).digest())
        stage: Stage[Any, ByHand] = Stage("prune", "all", VERSION, "ray", _run, {}, runtime=ByHand(job, setting, basis))
        report = functools.partial(_note, folder / PROGRESS)
        context = Context(store, stage, "by-hand", {}, cpus, report, ray_address=ray_address)
        try:
            told: dict[str, Any] = dict(stage.function(context).details)
        finally:
            (folder / PROGRESS).unlink(missing_ok=True)
        gone = [one["model"] for one in told["variants"] if not (folder / one["model"]).is_dir()]
        if gone:
            raise LodesetError(
                f"{folder / gone[0]} was made and is gone: prune into another folder, or remove {folder / 'parts'} too"
            )
        (folder / REPORT).write_text(json.dumps(told, indent=1) + "\n")
    return told


def size_of(model: Path, size: int | None) -> int:
    """The side of the images that the model in a folder takes, if `size` does not say it.

    Raises:
        LodesetError: there is no model, or it does not say it either.
    """
    dense = load_model(model)
    if size is not None:
        return size
    if not isinstance(dense, DinoVisionTransformer):
        raise LodesetError(f"{model} does not say how large its images are: give --size")
    return dense.image_size


def read_labelled(store: Store, target: TargetSet, cpus: int) -> Target:
    """What a run's `ingest` makes of a set, and evaluation takes of it.

    Raises:
        LodesetError: there are no such images, or none that are labelled.
    """
    stage = ingest_stage(Ingest(), Resources().beam, target.name, (target,))
    made = stage.function(Context(store, stage, str(stage.fingerprint({})), {}, cpus, lambda _: None))
    ingested = Artifact(stage.name, stage.set, stage.version, "by-hand", {}, {}, made.tables, made.rows)
    return read_target(store, ingested, target.name, target.label, target.split)[0]


def _note(path: Path, progress: Progress) -> None:
    """Told at once and whole: whoever watches reads at any moment."""
    with contextlib.suppress(OSError):
        begun = path.with_name(f".{path.name}")
        begun.write_text(json.dumps(dataclasses.asdict(progress)), encoding="utf-8")
        begun.replace(path)


@dataclasses.dataclass(frozen=True)
class ByHand:
    job: Job
    setting: Setting
    basis: tuple[str, str]


def _run(context: Context[Any, ByHand]) -> Outcome:
    asked = context.runtime
    done = run_job(context, asked.setting, asked.basis, asked.job, 0)
    return Outcome({"models": tuple(done.models)}, Rows(1, 1), details=done.report)
