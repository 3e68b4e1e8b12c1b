"""prune (Ray Data): the jobs of a configuration, one after another, and the report of them all."""

from __future__ import annotations

import functools
import json
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.dag.stored import Stored, stored
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.specs import SHARDS
from lodeset.pruning.config import Job, LotteryJob, PruneJob, SelfMaskingJob
from lodeset.pruning.jobs.setting import Done, Setting, Workplace
from lodeset.pruning.jobs.sweep import sweep
from lodeset.pruning.jobs.trained import draw_tickets, learn_all
from lodeset.pruning.specs import Dense, PruneRuntime, PruneSpec
from lodeset.training.checkpoint import MARKER
from lodeset.training.config import TrainingConfig
from lodeset.training.labelled import Target, read_target
from lodeset.training.origin import Origin
from lodeset.training.stages.train import start_of

VERSION = PruneSpec.VERSION
ALONE = "models"  # where the models of a job alone go, relative to the store


def run(context: Context[PruneSpec, PruneRuntime]) -> Outcome:
    store = context.store
    targets = tuple(
        read_target(store, context.inputs[f"images:{t.name}"], t.name, t.label, t.split)[0]
        for t in context.spec.targets
    )
    folder = f"pruned/{context.fingerprint[:16]}"
    dense = context.runtime.dense
    settings = _settings(context, targets, folder) if dense is None else {"train": _alone(context, dense, targets)}
    done = []
    for number, job in enumerate(context.spec.jobs):
        basis = (context.inputs[job.checkpoint].fingerprint, context.inputs["shards"].content[SHARDS])
        done.append(run_job(context, settings[job.checkpoint], basis, job, number))
    reports = [one.report for one in done]
    report_file = _write_report(store, folder, context.fingerprint, reports)
    return Outcome(
        tables={"report": (report_file,), "models": tuple(file for one in done for file in one.models)},
        rows=Rows(taken=len(done), kept=len(done)),
        details={
            "jobs": reports,
            "parts": sum(one.parts for one in done),
            "parts_made": sum(one.parts_made for one in done),
            "folder": folder,
            "work": context.stage.work,
        },
    )


def _settings(
    context: Context[PruneSpec, PruneRuntime], targets: tuple[Target, ...], folder: str
) -> dict[str, Setting]:
    """What the jobs on the model of each stage that trained one need, by the stage's name."""
    store, index = context.store, context.inputs["shards"].tables["index"]
    settings = {}
    for name, spec in context.runtime.training.items():
        trained, config = context.inputs[name], spec.config
        for file in (*(trained.tables["model"] if store.local else ()), *index):
            store.check(file)  # what reads them looks at no digest
        settings[name] = Setting(
            store,
            stored(store, trained.tables["model"]),
            (store.full_url(index[0].path),),
            config.crops.global_size,
            config.max_pixels,
            context.runtime.max_pixels,
            targets,
            folder,
            config.crops,
            _checkpoint(store, trained, config),
        )
    return settings


def _alone(context: Context[PruneSpec, PruneRuntime], dense: Dense, targets: tuple[Target, ...]) -> Setting:
    return Setting(
        context.store,
        Stored(folder=dense.folder),
        dense.index,
        dense.size,
        dense.max_pixels,
        context.runtime.max_pixels,
        targets,
        ALONE,
        dense.crops,
        dense.checkpoint,
    )


def _checkpoint(store: Store, trained: Artifact, config: TrainingConfig) -> Origin | None:
    """A run's last one, to go on from; artifacts of other hands need not have any."""
    files = trained.tables.get("checkpoints", ())
    marker = next((file for file in files if posixpath.basename(file.path) == MARKER), None)
    if marker is None:
        return None
    return start_of(store, files, marker, config)


def run_job(context: Context, setting: Setting, basis: tuple[str, str], job: Job, number: int) -> Done:
    """What a job leaves; `basis` is which model on which images.

    Raises:
        LodesetError: no image can be read, or the model cannot be used for it.
    """
    share = functools.partial(map_with_state, cpus=context.cpus, address=context.ray_address)
    work = Workplace(context, setting, share, basis)
    if isinstance(job, LotteryJob):
        return draw_tickets(work, job, number)
    if isinstance(job, SelfMaskingJob):
        return learn_all(work, job, number)
    assert isinstance(job, PruneJob)
    return sweep(work, job, number)


def _write_report(store: Store, folder: str, fingerprint: str, reports: Sequence[Mapping[str, Any]]) -> File:
    key = digest("prune_report", VERSION, fingerprint)
    found = store.part("prune_report", key)
    if found is None:
        relative = f"{folder}/report.json"
        with store.writing(relative) as sink:
            sink.write(json.dumps(list(reports), indent=1).encode())
        file = File(relative, len(reports), sink.size_bytes, sink.sha256())
        found = store.commit_part("prune_report", key, {}, {}, files={"report": file})
    return found.files["report"]
