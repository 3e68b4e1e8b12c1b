"""Train pruned and refitted models again: through `training`, by distillation from the dense model or by continuing its
run; or, if the dense model does not come from a run, by matching its outputs (`pruning/jobs/distil.py`).

Each recovery through a run uses all workers of the budget and has its own checkpoints, so a stopped one continues. The
three refitted ways of choosing units are recovered in the same way, so that the choice remains comparable with its
baselines.
"""

from __future__ import annotations

import functools
import json
import posixpath
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Progress
from lodeset.pipeline.dag.store import Part, Store
from lodeset.pipeline.dag.stored import Stored, stored
from lodeset.pipeline.engines.ray import job as ray_job
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.criteria import REFITTED
from lodeset.pruning.config import PruneJob, RecoverConfig, run_of
from lodeset.pruning.formats.saving import load_model
from lodeset.pruning.jobs.distil import TRAINED, distillation_inputs, distiller
from lodeset.pruning.jobs.judging import seen
from lodeset.pruning.jobs.setting import VERSION, Setting, Workplace, judging_inputs, kept_file
from lodeset.pruning.jobs.sweep_parts import agreement, publish
from lodeset.training.away import Away, RunFolder
from lodeset.training.config import TrainingConfig, identity_of
from lodeset.training.export import WEIGHTS
from lodeset.training.index import Shards, open_index
from lodeset.training.launch import launch
from lodeset.training.metrics import FILE as METRICS
from lodeset.training.narrow import ARCHITECTURE
from lodeset.training.origin import Origin
from lodeset.training.stages.train import folder_of, following

JUDGED = "prune_recovered_rows"
HOW = {"distill": "distilled", "finetune": "fine-tuned"}

Row = Mapping[str, Any]


def run_to_recover_by(setting: Setting, recover: RecoverConfig) -> tuple[Origin, TrainingConfig] | None:
    """Return the dense model's last checkpoint and the configuration to continue with; None if the model does not come
    from a run.

    Raises:
        LodesetError: `recover` needs a run and there is none, or does not fit the run.
    """
    if setting.trained is None or setting.trained.of is None:
        if recover.how == "distill":
            return None
        raise LodesetError(
            "recover: finetune continues a training run with its networks and their heads, and this model does not "
            "come from a run: give the folder "
            "of a run with its last checkpoint, or use `how: distill`"
        )
    try:
        return setting.trained, run_of(setting.trained.of, recover)
    except ValueError as error:
        raise LodesetError(f"recover does not fit the dense model's run: {error}") from error


def recovered(
    work: Workplace, job: PruneJob, variants: Iterable[tuple[Part, Row]], compared: list[int], number: int
) -> tuple[list[Row], list[Part], int]:
    """One more row for each refitted variant of the strengths to recover; the parts, and how many of them this run
    made.

    Raises:
        LodesetError: as `run_to_recover_by`, or training failed.
    """
    if job.recover is None:
        return [], [], 0
    run = run_to_recover_by(work.setting, job.recover)
    if run is None:
        inputs = distillation_inputs(work.setting, job.recover, job.seed, compared)
    else:
        inputs = [run[0].digest, identity_of(run[1]), job.recover.how]
    basis = digest(TRAINED, VERSION, *work.basis, work.setting.size, *inputs)
    wanted = [(part, row) for part, row in variants if row["method"] in REFITTED and row[job.swept] in job.recovered]
    # The key holds the bytes that a training starts from, not what models are judged on.
    keys = [digest(basis, *sorted(f.sha256 for name, f in part.files.items() if name != "row")) for part, _ in wanted]
    store = work.context.store
    items = [(key, (key, row, _model_of(store, part)), 1) for key, (part, row) in zip(keys, wanted, strict=True)]
    if run is None:
        distil = functools.partial(distiller, work.setting, job.recover, job.seed, compared, number)
        make = functools.partial(work.share, distil)
    else:
        make = functools.partial(_trained, work, job.recover, run[1], run[0], number)
    trained, new = made(work.context, TRAINED, items, make, unit="trainings")
    for key in keys:  # the models are published, and nothing continues from these checkpoints
        folder = _folder(work, key)
        if isinstance(folder, Away):
            folder.remove()
        else:
            shutil.rmtree(folder, ignore_errors=True)
    rows = [
        (key, (key, training, row), 1)
        for training, (variant, row) in zip(trained, wanted, strict=True)
        if (key := digest(JUDGED, training.key, variant.key, judging_inputs(work.setting), compared))
    ]
    judge = functools.partial(judged, work.setting, compared)
    parts, new_rows = made(work.context, JUDGED, rows, functools.partial(work.share, judge), unit="variants")
    recovered_rows = [json.loads(work.context.store.bytes_of(part.files["row"])) for part in parts]
    return recovered_rows, [*trained, *parts], len(new) + len(new_rows)


def _folder(work: Workplace, key: str) -> RunFolder:
    """Folder of a run's checkpoints, different for another stage that makes the same part at the same time."""
    return folder_of(work.context.store, digest(key, work.context.fingerprint))


def _model_of(store: Store, part: Part) -> Stored:
    """The folder of the model among a part's files."""
    return stored(store, [file for name, file in sorted(part.files.items()) if name not in ("row", "summary")])


def _trained(
    work: Workplace,
    recover: RecoverConfig,
    config: TrainingConfig,
    origin: Origin,
    number: int,
    items: Collection[tuple[str, Row, Stored]],
) -> Iterator[Part]:
    """Train one run after the other: each uses all workers."""
    store, setting = work.context.store, work.setting
    with ray_job(work.context.ray_address):
        for done, (key, row, model) in enumerate(items):
            started = time.time()
            folder = _folder(work, key)
            start = origin.model_copy(
                update={
                    "digest": digest(origin.digest, key),
                    "distil": recover.how == "distill",
                    "pruned": model.folder,
                    "pruned_model": None if store.local else model,
                }
            )

            def report(share: float, images: int, done: int = done) -> None:
                work.context.report(Progress((done + share) / len(items), images, phase="recovered"))

            with following(report, folder, config):
                summary = launch(config, Shards(index=setting.index), folder, work.context.cpus, start)
            stem = posixpath.basename(str(row["model"])).rpartition("-")[0]
            name = f"{setting.folder}/job-{number}/{stem}-{HOW[recover.how]}-{key[:8]}"
            files = publish(store, name, functools.partial(_copied, folder))
            run = {key: summary[key] for key in ("steps", "images_seen", "losses")} | {
                "how": HOW[recover.how],
                "model": name,
            }
            files["summary"] = kept_file(store, TRAINED, key, "summary.json", json.dumps(run).encode())
            yield store.commit_part(TRAINED, key, {}, {"images": 0}, time.time() - started, files=files)


def _copied(folder: RunFolder, to: Path) -> None:
    to.mkdir(parents=True)
    left = folder.left() if isinstance(folder, Away) else {}
    for name in (WEIGHTS, ARCHITECTURE, METRICS):
        if isinstance(folder, Away):
            folder.store.fetch(left[name], to / name)
        else:
            shutil.copyfile(folder / name, to / name)


def judged(setting: Setting, compared: list[int]) -> Callable[[tuple[str, Part, Row]], Part]:
    store, dense = setting.store, setting.model()
    pixels = setting.pixels(open_index(setting.index), compared)
    expected = seen(dense, pixels)

    def judge(item: tuple[str, Part, Row]) -> Part:
        key, trained, row = item
        started = time.time()
        run = json.loads(store.bytes_of(trained.files["summary"]))
        with _model_of(store, trained).here() as folder:
            model = load_model(folder)
        nonzero = sum(int((p != 0).sum()) for p in model.parameters())
        recovered_row = {
            **row,
            "method": f"{row['method']}, {run['how']}",
            "nonzero": nonzero,
            "density": nonzero / row["dense"]["parameters"],
            # The model is no longer a least-squares copy of the dense layers, and the removal check was made on other
            # weights.
            "unexplained": {},
            "converged": None,
            "removal_difference": None,
            "knn": setting.knn(model),
            "agreement": agreement(model, expected, pixels),
            "seconds": round(row["seconds"] + trained.seconds + time.time() - started, 3),
            **run,
        }
        files = {"row": kept_file(store, JUDGED, key, "row.json", json.dumps(recovered_row, indent=1).encode())}
        return store.commit_part(JUDGED, key, {}, {"images": 0}, time.time() - started, files=files)

    return judge
