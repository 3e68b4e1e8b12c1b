"""A training run on one worker: resume, step, log, checkpoint, export.

Shapes: W workers.
"""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lodeset.pipeline import own
from lodeset.pipeline.errors import LodesetError
from lodeset.training.checkpoint import load_checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint
from lodeset.training.config import TrainingConfig, identity_of
from lodeset.training.data import Batch, Batches, load_batches
from lodeset.training.export import export
from lodeset.training.index import Shards, open_index, weights_of
from lodeset.training.metrics import MetricsLog, feature_metrics
from lodeset.training.narrow import heads_of, narrow, save_narrow
from lodeset.training.origin import Origin, networks
from lodeset.training.parallel import recompute_activations, shard
from lodeset.training.schedules import StepValues, step_values
from lodeset.training.ssl import (
    average_gradients,
    clip_gradients,
    losses,
    make_optimiser,
    schedule,
    training_state,
    update_teacher,
)
from lodeset.training.vit import DinoVisionTransformer

SUMMARY = "summary.json"


def train_loop(
    config: TrainingConfig,
    shards: Shards,
    folder: Path,
    rank: int,
    world_size: int,
    device: torch.device,
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Train to `config.steps` from the newest checkpoint in `folder` if there is one, otherwise from `origin`; every
    worker calls this.

    Worker 0 writes `metrics.jsonl`, `step-*/`, and at the end the backbone of the student's moving mean (see `export`;
    for a pruned one `save_narrow`) and `summary.json`. If world_size > 1, the default process group must be
    initialized. Returns the summary: steps, images (in the index), images_seen, skipped (unreadable; since the last
    resume), resumed_step, seconds, images_per_s, losses (the last logged line).

    Raises:
        LodesetError: the data or the folder do not fit (see `open_index`, `Batches`, `newest_checkpoint`), or a loss or
            gradient became infinite or NaN.
    """
    group = dist.group.WORLD if world_size > 1 else None
    index = open_index(shards.index)
    weights = weights_of(index, shards.selected, config.mix) if config.mix else None
    batches = Batches(index, config, rank, world_size, weights)
    own.mark(folder, "run")

    nets = networks(config, origin)
    student = nets.student
    if config.activation_checkpointing:
        recompute_activations(student)
    if config.fsdp and group is not None:
        shard(
            nets, group, device, config.precision == "bf16"
        )  # moves shards from here, so that no device ever holds the whole network
    else:
        nets = nets.to(device)
    optimiser = make_optimiser(student, config.optimiser)
    identity = {"training": identity_of(config), "images": index.digest()}
    settings = config.model_dump(mode="json")
    if origin is not None:
        identity["origin"] = origin.digest
    if weights is not None:
        identity["weights"] = hashlib.sha256(weights.tobytes()).hexdigest()
    if batches.order.blocks is not None:
        identity["blocks"] = batches.order.blocks.digest()
    state = training_state(nets, optimiser)
    first_step, checkpoint = _resumed(folder, identity, group, rank)
    if checkpoint is not None:
        load_checkpoint(checkpoint, state, group)
    log = MetricsLog(folder, first_step) if rank == 0 else None

    started = logged = time.perf_counter()
    logged_step, skipped = first_step, 0.0
    line: dict[str, Any] = log.last if log is not None else {}
    for batch in load_batches(batches, first_step, device.type == "cuda"):
        done = batch.step + 1
        values = step_values(config, batch.step)
        torch.manual_seed(_seed(config.seed, batch.step, rank))  # stochastic depth
        schedule(optimiser, values)

        seen = losses(nets, batch.to(device), values.teacher_temperature, config, group)
        every = _gather(_local_values(seen.terms, batch), group, world_size)  # [W, terms + 1]
        _stop_if_not_finite(every[:, :-1], list(seen.terms), batch, folder, rank)
        skipped += float(every[:, -1].sum())

        optimiser.zero_grad()
        torch.autograd.backward(seen.total)
        if group is not None and not config.fsdp:
            average_gradients(student.parameters(), group, world_size)
        gradient_norm = clip_gradients(student, config.optimiser.clip_norm)
        _stop_if_gradient_not_finite(gradient_norm, config, batch, folder, rank)
        optimiser.step()
        update_teacher(student, nets.average, values.momentum)

        if done % config.log_every == 0 or done == config.steps:
            now = time.perf_counter()
            terms = dict(zip(seen.terms, every[:, :-1].mean(dim=0).tolist(), strict=True))
            line = _line(done, terms, values, gradient_norm, skipped) | feature_metrics(seen)
            line["images_per_s"] = (done - logged_step) * config.batch / (now - logged)
            logged, logged_step = now, done
            if log is not None:
                log.append(line)
        if done % config.checkpoint_every == 0 or done == config.steps:
            checkpoint = save_checkpoint(folder, done, state, identity, config.keep_checkpoints, group, settings)

    seconds, steps_made = time.perf_counter() - started, config.steps - first_step
    summary = {
        "steps": config.steps,
        "images": len(index),
        "images_seen": config.steps * config.batch,
        "skipped": int(skipped),
        "workers": world_size,
        "resumed_step": first_step,
        "seconds": seconds,
        "images_per_s": steps_made * config.batch / seconds if steps_made else line.get("images_per_s", 0.0),
        "losses": {name: line[name] for name in ("loss", "dino", "ibot", "koleo") if name in line},
    }
    if log is not None:
        log.close()
        assert checkpoint is not None  # the last step always writes one
        pruned = origin is not None and origin.pruned is not None
        _finish(checkpoint, nets.average.backbone, pruned, folder, summary)
    return summary


def _resumed(
    folder: Path, identity: dict[str, Any], group: dist.ProcessGroup | None, rank: int
) -> tuple[int, Path | None]:
    """The step to continue from, and its checkpoint; worker 0 looks and broadcasts the result."""
    newest = [(newest_checkpoint(folder, identity) or (0, None)) if rank == 0 else (0, None)]
    if group is not None:
        dist.broadcast_object_list(newest, 0, group)
    return newest[0]


def _finish(
    checkpoint: Path, trained: DinoVisionTransformer, pruned: bool, folder: Path, summary: dict[str, Any]
) -> None:
    """Export the moving mean from the last checkpoint as a whole, however it was trained, in the format of the pruned
    model it came from.
    """
    backbone = DinoVisionTransformer(trained.config, trained.image_size)
    weights = read_checkpoint(checkpoint, "teacher.backbone.")
    narrow(backbone, heads_of(trained), weights)
    backbone.load_state_dict(weights)
    if pruned:
        save_narrow(backbone, folder)
    else:
        export(backbone, folder)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def _seed(seed: int, step: int, rank: int) -> int:
    # Odd multipliers keep (step, rank) pairs apart; torch takes 64 bits.
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63


def _local_values(terms: dict[str, Tensor], batch: Batch) -> Tensor:
    values = torch.stack([term.detach() for term in terms.values()])
    return torch.cat([values, values.new_tensor([len(batch.skipped)])])


def _gather(values: Tensor, group: dist.ProcessGroup | None, world_size: int) -> Tensor:
    if group is None:
        return values[None].cpu()
    gathered = [torch.empty_like(values) for _ in range(world_size)]
    dist.all_gather(gathered, values, group=group)
    return torch.stack(gathered).cpu()


def _stop_if_not_finite(every: Tensor, names: list[str], batch: Batch, folder: Path, rank: int) -> None:
    """All workers see the same [W, terms] and stop at the same step; those concerned save their image ids first."""
    bad = ~torch.isfinite(every)
    if not bool(bad.any()):
        return
    if bool(bad[rank].any()):
        _write_ids(batch, folder, rank)
    culprit, term = (int(x) for x in bad.nonzero()[0])
    raise LodesetError(
        f"loss term {names[term]} became {float(every[culprit, term])} on worker {culprit} at step {batch.step}: check "
        f"its images, listed in {folder / _ids_file(batch.step, culprit)}, or lower training.optimiser.base_lr"
    )


def _stop_if_gradient_not_finite(norm: float, config: TrainingConfig, batch: Batch, folder: Path, rank: int) -> None:
    """The norm is that of the mean gradient, so all workers stop here, and each one saves its image ids."""
    if math.isfinite(norm):
        return
    _write_ids(batch, folder, rank)
    raise LodesetError(
        f"the gradient's norm became {norm} on worker {rank} at step {batch.step} although every loss was finite: "
        f"lower training.optimiser.base_lr ({config.optimiser.base_lr}); the step's images are listed in "
        f"{folder / _ids_file(batch.step, rank)}"
    )


def _ids_file(step: int, rank: int) -> str:
    return f"nonfinite-step-{step:07d}-worker-{rank}.json"


def _write_ids(batch: Batch, folder: Path, rank: int) -> None:
    text = json.dumps({"step": batch.step, "worker": rank, "image_ids": batch.image_ids}, indent=2)
    (folder / _ids_file(batch.step, rank)).write_text(text + "\n")


def _line(
    done: int, terms: dict[str, float], values: StepValues, gradient_norm: float, skipped: float
) -> dict[str, Any]:
    return {
        "step": done,
        "loss": sum(terms.values()),
        **terms,
        "lr": values.lr,
        "momentum": values.momentum,
        "weight_decay": values.weight_decay,
        "teacher_temperature": values.teacher_temperature,
        "gradient_norm": gradient_norm,
        "skipped": int(skipped),
    }
