"""A training run on one worker: resume, step, log, checkpoint, export.

Shapes: W workers.
"""

import contextlib
import hashlib
import json
import math
import posixpath
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lodeset.pipeline import own
from lodeset.pipeline.errors import LodesetError
from lodeset.training.away import Away
from lodeset.training.backbone import made
from lodeset.training.checkpoint import load_checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint
from lodeset.training.config import TrainingConfig, identity_of
from lodeset.training.data import Batch, Batches, load_batches
from lodeset.training.export import CONFIG, PREPROCESSOR, WEIGHTS, export
from lodeset.training.index import Shards, open_index, weights_of
from lodeset.training.metrics import FILE as METRICS
from lodeset.training.metrics import MetricsLog, feature_metrics
from lodeset.training.narrow import ARCHITECTURE, heads_of, narrow, save_narrow
from lodeset.training.objectives.objective import Objective, Views
from lodeset.training.origin import Origin, networks
from lodeset.training.parallel import recompute_activations, shard
from lodeset.training.schedules import StepValues, step_values
from lodeset.training.ssl import (
    Networks,
    StepLosses,
    average_gradients,
    clip_gradients,
    make_optimiser,
    objective_of,
    schedule,
    training_state,
    update_teacher,
)
from lodeset.training.trackers import EVENTS, IDS, Tracked, opened
from lodeset.training.vit import DinoVisionTransformer

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Which of a run's processes this is; `group` joins them, where there are several."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as this worker sees it: what its steps change, and what they read."""

    config: TrainingConfig
    objective: Objective
    folder: Path
    worker: Worker
    images: int  # in the index
    batches: Batches
    nets: Networks
    optimiser: torch.optim.AdamW
    state: dict[str, Tensor]  # of a checkpoint
    identity: dict[str, Any]  # what a checkpoint must have in common with the run
    first_step: int
    checkpoint: Path | None  # that it goes on from
    pruned: bool  # its backbone is narrower than its configuration says
    away: Away | None = None  # where everything is kept, unless in `folder`

    def kept(self, name: str) -> str:
        """Puts a file of the folder where everything is kept, and says where that is."""
        if self.away is None:
            return str(self.folder / name)
        self.away.keep(self.folder / name, name)
        return f"{self.away}/{name}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did."""

    done: int  # steps so far
    values: StepValues
    seen: StepLosses
    terms: dict[str, float]  # means over the workers
    gradient_norm: float
    skipped: float  # images that could not be read, over all workers


def train_loop(
    *,
    config: TrainingConfig,
    shards: Shards,
    folder: Path,
    rank: int,
    world_size: int,
    device: torch.device,
    origin: Origin | None = None,
    away: Away | None = None,
) -> dict[str, Any]:
    """Train to `config.steps` from the newest checkpoint in `folder` if there is one, otherwise from `origin`; every
    worker calls this.

    Worker 0 writes `metrics.jsonl`, `step-*/`, and at the end the backbone that the run is for (see `Networks.average`
    and `export`; for a pruned one `save_narrow`) and `summary.json`. If world_size > 1, the default process group must
    be initialized. With `away`, `folder` is one of this machine, and everything is kept there. Returns the summary:
    steps, images (in the index), images_seen, skipped (unreadable; since the last resume), resumed_step, seconds,
    images_per_s, losses (the last logged line).

    Raises:
        LodesetError: the data or the folder do not fit (see `open_index`, `Batches`, `newest_checkpoint`), or a loss or
            gradient became infinite or NaN.
    """
    group = dist.group.WORLD if world_size > 1 else None
    worker = Worker(rank=rank, size=world_size, device=device, group=group)
    run = set_up(config, shards, folder, worker, origin, away)
    journal, checkpoint = Journal(run), run.checkpoint
    with away.telling(folder / METRICS) if away is not None and rank == 0 else contextlib.nullcontext():
        for batch in load_batches(run.batches, run.first_step, device.type == "cuda"):
            step = take_step(run, batch)
            journal.note(step)
            if step.done % config.checkpoint_every == 0 or step.done == config.steps:
                checkpoint = save_checkpoint(
                    folder,
                    step.done,
                    run.state,
                    run.identity,
                    config.keep_checkpoints,
                    group,
                    config.model_dump(mode="json"),
                    away,
                )
                journal.keep()
    summary = journal.close()
    if rank == 0:
        assert checkpoint is not None  # of the last step
        _finish(run, checkpoint, summary)
    return summary


def set_up(
    config: TrainingConfig,
    shards: Shards,
    folder: Path,
    worker: Worker,
    origin: Origin | None,
    away: Away | None = None,
) -> Run:
    """The run before its first step, or as its newest checkpoint left it.

    Raises:
        LodesetError: the data or the folder do not fit.
    """
    objective = objective_of(config)
    index = open_index(shards.index)
    weights = weights_of(index, shards.selected, config.mix) if config.mix else None
    batches = Batches(index, looked_at(config, objective.views), worker.rank, worker.size, weights)
    own.mark(folder, "run")

    nets = networks(config, origin)
    if config.activation_checkpointing:
        recompute_activations(nets.student)
    if config.fsdp and worker.group is not None:
        # From here, so that no device ever holds all of it.
        shard(nets, worker.group, worker.device, config.precision == "bf16")
    else:
        nets = nets.to(worker.device)
    optimiser = make_optimiser(nets.student, config.optimiser)
    identity = {"training": identity_of(config), "images": index.digest()}
    if origin is not None:
        identity["origin"] = origin.digest
    if weights is not None:
        identity["weights"] = hashlib.sha256(weights.tobytes()).hexdigest()
    if batches.order.blocks is not None:
        identity["blocks"] = batches.order.blocks.digest()
    state = training_state(nets, optimiser)
    first_step, checkpoint = _resumed(folder, identity, worker, away)
    if checkpoint is not None:
        load_checkpoint(checkpoint, state, worker.group)
    return Run(
        config=config,
        objective=objective,
        folder=folder,
        worker=worker,
        images=len(index),
        batches=batches,
        nets=nets,
        optimiser=optimiser,
        state=state,
        identity=identity,
        first_step=first_step,
        checkpoint=checkpoint,
        pruned=origin is not None and origin.pruned_at is not None,
        away=away,
    )


def looked_at(config: TrainingConfig, views: Views) -> TrainingConfig:
    """The configuration of batches: what the objective does not look at is not made."""
    changed: dict[str, Any] = {}
    if not views.local_crops:
        changed["crops"] = config.crops.model_copy(update={"local_count": 0})
    if not views.masks:
        changed["masking"] = config.masking.model_copy(update={"probability": 0.0})
    return config.model_copy(update=changed)


def take_step(run: Run, batch: Batch) -> Step:
    """One optimiser step.

    Raises:
        LodesetError: a loss or a gradient is infinite or NaN.
    """
    config, nets, worker = run.config, run.nets, run.worker
    student = nets.student
    values = step_values(config, batch.step)
    torch.manual_seed(_seed(config.seed, batch.step, worker.rank))  # stochastic depth
    schedule(run.optimiser, values)

    seen = run.objective.losses(nets, batch.to(worker.device), values, config, worker.group)
    every = _gather(_local_values(seen.terms, batch), worker)  # [W, terms + 1]
    _stop_if_not_finite(every[:, :-1], list(seen.terms), batch, run)

    run.optimiser.zero_grad()
    torch.autograd.backward(seen.total)
    if worker.group is not None and not config.fsdp:
        average_gradients(student.parameters(), worker.group, worker.size)
    gradient_norm = clip_gradients(student, config.optimiser.clip_norm)
    _stop_if_gradient_not_finite(gradient_norm, batch, run)
    run.optimiser.step()
    if nets.averages:
        update_teacher(student, nets.average, values.momentum)
    return Step(
        done=batch.step + 1,
        values=values,
        seen=seen,
        terms=dict(zip(seen.terms, every[:, :-1].mean(dim=0).tolist(), strict=True)),
        gradient_norm=gradient_norm,
        skipped=float(every[:, -1].sum()),
    )


class Journal:
    """The lines of `metrics.jsonl`, which worker 0 writes, and the summary."""

    def __init__(self, run: Run) -> None:
        self.run = run
        if run.away is not None and run.worker.rank == 0:
            run.away.bring(METRICS, run.folder)
            run.away.bring(IDS, run.folder)
        self.log = _log(run) if run.worker.rank == 0 else None
        self.line: dict[str, Any] = self.log.last if self.log is not None else {}
        self.skipped = 0.0
        self.started = self.logged = time.perf_counter()
        self.logged_step = run.first_step

    def note(self, step: Step) -> None:
        config = self.run.config
        self.skipped += step.skipped
        if step.done % config.log_every and step.done != config.steps:
            return
        now = time.perf_counter()
        self.line = _line(step, self.skipped) | feature_metrics(step.seen)
        self.line["images_per_s"] = (step.done - self.logged_step) * config.batch / (now - self.logged)
        self.logged, self.logged_step = now, step.done
        if self.log is not None:
            self.log.append(self.line)

    def keep(self) -> None:
        """Puts the metrics so far where everything is kept: what a run that is lost now continues with."""
        if self.run.away is not None and self.log is not None:
            self.log.flush()
            folder = self.run.folder
            for path in (folder / METRICS, folder / IDS, *(folder / EVENTS).glob("*")):
                if path.is_file():
                    self.run.kept(path.relative_to(folder).as_posix())

    def close(self) -> dict[str, Any]:
        """The summary."""
        run, line = self.run, self.line
        seconds, steps_made = time.perf_counter() - self.started, run.config.steps - run.first_step
        if self.log is not None:
            self.log.close()
            self.keep()
        return {
            "steps": run.config.steps,
            "images": run.images,
            "images_seen": run.config.steps * run.config.batch,
            "skipped": int(self.skipped),
            "workers": run.worker.size,
            "resumed_step": run.first_step,
            "seconds": seconds,
            "images_per_s": steps_made * run.config.batch / seconds if steps_made else line.get("images_per_s", 0.0),
            "losses": {name: line[name] for name in ("loss", *run.objective.terms) if name in line},
        }


def _log(run: Run) -> MetricsLog:
    about = Tracked(
        folder=run.folder,
        name=posixpath.basename(str(run.away or run.folder)),
        settings=identity_of(run.config),
        resumed_step=run.first_step,
    )
    return MetricsLog(run.folder, run.first_step, opened(run.config.trackers, about))


def _resumed(folder: Path, identity: dict[str, Any], worker: Worker, away: Away | None) -> tuple[int, Path | None]:
    """The step to go on from, and the checkpoint; worker 0 looks, and tells the others."""
    found: list[tuple[int, Path | None]] = [(0, None)]
    if worker.rank == 0:
        newest = newest_checkpoint(folder, identity) if away is None else away.newest(identity, folder)
        found = [newest or (0, None)]
    if worker.group is not None:
        dist.broadcast_object_list(found, 0, worker.group)
    step, path = found[0]
    return step, away.fetch(step, folder) if away is not None and path is not None else path


def _finish(run: Run, checkpoint: Path, summary: dict[str, Any]) -> None:
    """Exports the backbone as the last checkpoint holds it: whole, however it was trained; in the form of what it was pruned from."""
    if run.away is not None:
        checkpoint = run.away.fetch(run.config.steps, run.folder)  # what other machines wrote, too
    trained = run.nets.average.backbone
    backbone = made(trained.config, trained.image_size)
    weights = read_checkpoint(checkpoint, "teacher.backbone." if run.nets.averages else "student.backbone.")
    narrow(backbone, heads_of(trained), weights)
    backbone.load_state_dict(weights)
    if isinstance(backbone, DinoVisionTransformer) and run.pruned:
        save_narrow(backbone, run.folder)
    else:
        export(backbone, run.folder)
    (run.folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    if run.away is not None:
        run.away.leave(run.folder, [WEIGHTS, CONFIG, PREPROCESSOR, ARCHITECTURE, METRICS, SUMMARY])


def _seed(seed: int, step: int, rank: int) -> int:
    # Odd multipliers keep (step, rank) pairs apart; torch takes 64 bits.
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63


def _local_values(terms: dict[str, Tensor], batch: Batch) -> Tensor:
    values = torch.stack([term.detach() for term in terms.values()])
    return torch.cat([values, values.new_tensor([len(batch.skipped)])])


def _gather(values: Tensor, worker: Worker) -> Tensor:
    if worker.group is None:
        return values[None].cpu()
    gathered = [torch.empty_like(values) for _ in range(worker.size)]
    dist.all_gather(gathered, values, group=worker.group)
    return torch.stack(gathered).cpu()


def _stop_if_not_finite(every: Tensor, names: list[str], batch: Batch, run: Run) -> None:
    """All workers see the same [W, terms] and stop at the same step; those concerned save their image ids first."""
    bad = ~torch.isfinite(every)
    if not bool(bad.any()):
        return
    if bool(bad[run.worker.rank].any()):
        _write_ids(batch, run)
    culprit, term = (int(x) for x in bad.nonzero()[0])
    folder = run.folder if run.away is None else run.away
    raise LodesetError(
        f"loss term {names[term]} became {float(every[culprit, term])} on worker {culprit} at step {batch.step}: check "
        f"its images, listed in {folder}/{_ids_file(batch.step, culprit)}, or lower training.optimiser.base_lr"
    )


def _stop_if_gradient_not_finite(norm: float, batch: Batch, run: Run) -> None:
    """The norm is that of the mean gradient, so all workers stop here, and each one saves its image ids."""
    if math.isfinite(norm):
        return
    where = _write_ids(batch, run)
    raise LodesetError(
        f"the gradient's norm became {norm} on worker {run.worker.rank} at step {batch.step} although every loss was finite: "
        f"lower training.optimiser.base_lr ({run.config.optimiser.base_lr}); the step's images are listed in {where}"
    )


def _ids_file(step: int, rank: int) -> str:
    return f"nonfinite-step-{step:07d}-worker-{rank}.json"


def _write_ids(batch: Batch, run: Run) -> str:
    """Returns where."""
    name = _ids_file(batch.step, run.worker.rank)
    text = json.dumps({"step": batch.step, "worker": run.worker.rank, "image_ids": batch.image_ids}, indent=2)
    (run.folder / name).write_text(text + "\n")
    return run.kept(name)


def _line(step: Step, skipped: float) -> dict[str, Any]:
    return {
        "step": step.done,
        "loss": sum(step.terms.values()),
        **step.terms,
        "lr": step.values.lr,
        "momentum": step.values.momentum,
        "weight_decay": step.values.weight_decay,
        "teacher_temperature": step.values.teacher_temperature,
        "gradient_norm": step.gradient_norm,
        "skipped": int(skipped),
    }
