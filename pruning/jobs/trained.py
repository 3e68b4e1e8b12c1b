"""Jobs that train: lottery tickets round after round, and masks of a frozen network. Each training is a part, and Ray
workers share the parts that do not depend on one another.
"""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import Tensor, nn

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.store import File, Part, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.config import Learned, LotteryJob, SelfMaskingJob
from lodeset.pruning.formats.saving import save_pruned
from lodeset.pruning.jobs.cost import shares
from lodeset.pruning.jobs.judging import judged
from lodeset.pruning.jobs.setting import VERSION, Done, Setting, Workplace, judging_inputs, kept_file
from lodeset.pruning.jobs.sweep_parts import publish
from lodeset.pruning.learning.examples import Examples, Gallery, Images, gallery_of
from lodeset.pruning.learning.loop import NotLearnedError, Recipe
from lodeset.pruning.learning.loop import train as learn
from lodeset.pruning.learning.lottery import (
    Start,
    again,
    begin,
    fresh,
    next_masks,
    random_masks,
    state_of,
    units_kept,
    without_units,
)
from lodeset.pruning.learning.masks import (
    Masks,
    at_random,
    density,
    digest_of,
    everything,
    maskable,
    overlap,
    save_masks,
)
from lodeset.pruning.learning.self_masking import learn_masks, masked_network
from lodeset.pruning.learning.tasks import TaskName, features_of, make_task
from lodeset.pruning.units.groups import evaluating, find_groups
from lodeset.pruning.units.removal import apply
from lodeset.training.index import ShardIndex, open_index

TICKETS, LEARNED = "prune_tickets", "prune_masks"
MASKS = "masks.safetensors"

Chosen = Literal["dense", "magnitude", "random"]


class School:
    """The training data of a job: images of the shards, or of a target set if the task is to predict labels."""

    def __init__(self, setting: Setting, job: Learned) -> None:
        self.setting, self.job = setting, job
        self.crops = setting.views(job.crops)

    def examples(self, task: TaskName) -> tuple[Examples, int]:
        """The images that a task is trained on, and its number of classes.

        Raises:
            LodesetError: there is no target set to take labels from.
        """
        gallery = self.gallery if task == "labels" else None
        images: Images = self.index if gallery is None else gallery
        limit = self.setting.calibration_max_pixels if gallery is None else self.setting.target_max_pixels
        codes, classes = (None, 0) if gallery is None else (gallery.codes, gallery.classes)
        return Examples(images, codes, self.crops, self.job.batch, self.job.seed, limit), classes

    @functools.cached_property
    def index(self) -> ShardIndex:
        return open_index(self.setting.index)

    @functools.cached_property
    def gallery(self) -> Gallery:
        return gallery_of(self.setting.target(self.job.target))

    def width(self, network: nn.Module) -> int:
        """Width of the features that a network returns."""
        with evaluating(network):
            return int(features_of(network, self.setting.example()).shape[1])


def _row(
    setting: Setting,
    pruned: nn.Module,
    dense: nn.Module,
    channels: Mapping[str, int],
    masks: Masks,
    of: str,
    folder: str,
    seed: int,
) -> tuple[dict[str, Any], dict[str, File]]:
    """The report row of a network with masked weights, and the files of that network and its masks; `of`: see
    `save_masks`.
    """
    accuracies = judged(pruned, setting.targets, setting.size, setting.target_max_pixels, seed)
    row = {
        **shares(pruned, dense, channels, setting.example()),
        "kept": density(masks),
        "knn": accuracies.knn,
        "linear": accuracies.linear,
        "model": folder,
    }

    def write(to: Path) -> None:
        save_pruned(pruned, to, setting.example())
        save_masks(to / MASKS, masks, of)

    return row, publish(setting.store, folder, write)


# -- lottery tickets


@dataclass(frozen=True)
class Ticket:
    """One training: its masks, its round and its task. `before` and `start` are results of the last round and of the
    dense network.
    """

    key: str
    chain: TaskName  # task on which the masks were found
    task: TaskName  # task on which they are trained: the same, or labels
    chosen: Chosen
    round: int
    before: File | None = None
    start: File | None = None

    @property
    def method(self) -> str:
        how = {"dense": self.chain, "magnitude": self.chain, "random": f"{self.chain}, at random"}[self.chosen]
        return how if self.task == self.chain else f"{how}, then {self.task}"

    @property
    def name(self) -> str:
        """Name of a folder."""
        suffix = "" if self.task == self.chain else f"-{self.task}"
        return f"{self.chain}-{self.chosen}{suffix}-round-{self.round}"


def draw_tickets(work: Workplace, job: LotteryJob, number: int) -> Done:
    """Prune round after round on every task; then train as many random weights, and every ticket on labels.

    Raises:
        LodesetError: there are no labels where a task needs them, or a loss is not finite.
    """
    started = time.time()
    setting, stage = work.setting, TICKETS
    labelled = "labels" in job.tasks or (job.transfer and bool(setting.targets))
    basis = digest(
        stage,
        VERSION,
        *work.basis,
        setting.size,
        setting.crops,
        job.model_copy(update={"rounds": 1, "transfer": True, "tasks": ("labels",)}),
        judging_inputs(setting),
    )
    make = functools.partial(trainer, setting, job, number)
    trained: list[tuple[Ticket, Part]] = []
    new = 0

    def drawn(tickets: Sequence[Ticket]) -> list[Part]:
        nonlocal new
        parts, fresh_ones = made(
            work.context, stage, [(t.key, t, 1) for t in tickets], functools.partial(work.share, make), unit="trainings"
        )
        trained.extend(zip(tickets, parts, strict=True))
        new += len(fresh_ones)
        return parts

    last = [Ticket(digest(basis, task, 0), task, task, "dense", 0) for task in job.tasks]
    starts = drawn(last)
    before = starts
    controls: list[Ticket] = []
    for turn in range(job.rounds + 1):
        if turn:
            last = [
                Ticket(
                    digest(old.key, "next"),
                    old.chain,
                    old.task,
                    "magnitude",
                    turn,
                    part.files["state"],
                    start.files["state"],
                )
                for old, part, start in zip(last, before, starts, strict=True)
            ]
            before = drawn(last)
        for ticket, part, start in zip(last, before, starts, strict=True):
            files = part.files["state"], start.files["state"]
            kinds: tuple[Chosen, ...] = (ticket.chosen, "random") if turn else (ticket.chosen,)
            if turn:
                controls.append(Ticket(digest(ticket.key, "random"), ticket.chain, ticket.task, "random", turn, *files))
            if job.transfer and labelled and ticket.chain != "labels":
                keys = {kind: digest(ticket.key, "labels", kind) for kind in kinds}
                controls += [Ticket(keys[kind], ticket.chain, "labels", kind, turn, *files) for kind in kinds]
    drawn(controls)
    rows = [json.loads(work.context.store.bytes_of(part.files["row"])) for _, part in trained]
    masks = {
        (t.chain, t.round): part.files["state"] for t, part in trained if t.chosen == "magnitude" and t.task == t.chain
    }
    report = {
        "job": job.model_dump(mode="json"),
        "images": len(open_index(setting.index)),
        "knn_dense": {},
        "skipped_modules": rows[0]["left_whole"],
        "variants": rows,
        "overlaps": _overlaps(work.context.store, job, masks),
        "seconds": round(time.time() - started, 2),
    }
    models = [file for _, part in trained for name, file in sorted(part.files.items()) if name not in ("row", "state")]
    return Done(report, models, len(trained), new)


def _overlaps(store: Store, job: LotteryJob, masks: Mapping[tuple[TaskName, int], File]) -> list[dict[str, Any]]:
    """The overlap of the masks of each two tasks, round by round."""
    overlaps = []
    for turn in range(1, job.rounds + 1):
        of = {task: _masks_in(_tensors(store, masks[task, turn])) for task in job.tasks}
        for first, second in combinations(job.tasks, 2):
            overlaps.append({"round": turn, "one": first, "other": second, **asdict(overlap(of[first], of[second]))})
    return overlaps


def trainer(setting: Setting, job: LotteryJob, number: int) -> Callable[[Ticket], Part]:
    store, example = setting.store, setting.example()
    dense = setting.stored()
    if job.start == "fresh":
        dense = fresh(dense, job.seed)
    groups_found = find_groups(dense, example) if job.structured else None
    groups = groups_found.prunable if groups_found is not None else None
    school = School(setting, job)
    recipe = Recipe(job.steps, job.lr, job.weight_decay, job.warmup, job.seed)
    rewind = round(job.rewind * job.steps)

    def train(ticket: Ticket) -> Part:
        started = time.time()
        network = copy.deepcopy(dense)
        examples, classes = school.examples(ticket.task)
        task = make_task(ticket.task, network, school.width(dense), classes, job.seed)
        state: dict[str, Tensor] = {}
        if ticket.before is None or ticket.start is None:
            masks = everything(network)
            start, loss = begin(network, task, examples, recipe, rewind)
            state |= {f"start.network.{name}": tensor for name, tensor in start.network.items()}
            state |= {f"start.task.{name}": tensor for name, tensor in start.task.items()}
        else:
            first, previous = _tensors(store, ticket.start), _tensors(store, ticket.before)
            start = Start(_under(first, "start.network."), _under(first, "start.task."))
            masks = _masks_in(previous)
            if ticket.chosen == "random":
                masks = random_masks(network, masks, groups, job.seed)
            elif ticket.task == ticket.chain:
                network.load_state_dict(_under(previous, "network."))
                masks = next_masks(network, masks, (1 - job.rate) ** ticket.round, job.scope, groups)
            if ticket.task == ticket.chain:
                loss = again(network, task, start, masks, examples, recipe, rewind)
            else:  # the ticket, with a new head
                network.load_state_dict(start.network)
                loss = learn(network, task, masks, examples, recipe, range(job.steps))
        if ticket.task == ticket.chain and ticket.chosen != "random":  # the next round continues from this one
            state |= {f"network.{name}": tensor for name, tensor in state_of(network).items()}
            state |= {f"mask.{name}": mask for name, mask in masks.items()}
        pruned, difference = network, 0.0
        channels = {"pruned": 0, "dense": 0}
        if groups is not None:
            pruned, difference = apply(network, groups, without_units(groups, masks), example)
            left_units = sum(map(len, units_kept(masks, groups).values()))
            channels = {"pruned": left_units, "dense": sum(group.units for group in groups)}
        folder = f"{setting.folder}/job-{number}/{ticket.name}-{ticket.key[:8]}"
        row, files = _row(setting, pruned, dense, channels, masks, digest_of(start.network), folder, job.seed)
        row = {
            "method": ticket.method,
            "task": ticket.task,
            "masks_of": ticket.chain,
            "round": ticket.round,
            **row,
            "loss": loss,
            "removal_difference": difference,
            "left_whole": groups_found.skipped if groups_found is not None else {},
            "seconds": round(time.time() - started, 2),
        }
        if state:
            files["state"] = kept_file(
                store,
                TICKETS,
                ticket.key,
                "state.safetensors",
                safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()}),
            )
        files["row"] = kept_file(store, TICKETS, ticket.key, "row.json", json.dumps(row, indent=1).encode())
        return store.commit_part(TICKETS, ticket.key, {}, {"images": 0}, time.time() - started, files=files)

    return train


def _tensors(store: Store, file: File) -> dict[str, Tensor]:
    return safetensors.torch.load(store.bytes_of(file))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _masks_in(tensors: Mapping[str, Tensor]) -> Masks:
    return _under(tensors, "mask.")


# -- masks of a frozen network


def learn_all(work: Workplace, job: SelfMaskingJob, number: int) -> Done:
    """Learn masks at every learning rate of the sweep, and compare them with as many random weights in every layer.

    Raises:
        LodesetError: there are no labels where the task needs them, or a loss is not finite.
    """
    started = time.time()
    setting = work.setting
    basis = digest(
        LEARNED,
        VERSION,
        *work.basis,
        setting.size,
        setting.crops,
        job.model_copy(update={"lr": (1.0,)}),
        judging_inputs(setting),
    )
    wanted = [(key, (key, lr), 1) for lr in sorted(job.lr) if (key := digest(basis, lr))]
    make = functools.partial(masker, setting, job, number)
    parts, new = made(work.context, LEARNED, wanted, functools.partial(work.share, make), unit="trainings")
    results = [json.loads(work.context.store.bytes_of(part.files["rows"])) for part in parts]
    refused = {
        f"lr {lr:g}": result["refused"]
        for lr, result in zip(sorted(job.lr), results, strict=True)
        if "refused" in result
    }
    if len(refused) == len(parts):
        raise LodesetError(f"no masks were learned: {'; '.join(refused.values())}")
    before = work.once(
        LEARNED,
        digest(basis, "dense"),
        lambda: asdict(judged(setting.stored(), setting.targets, setting.size, setting.target_max_pixels, job.seed)),
    )
    report = {
        "job": job.model_dump(mode="json"),
        "images": len(open_index(setting.index)),
        "knn_dense": before["knn"],
        "linear_dense": before["linear"],
        "skipped_modules": refused,
        "variants": [row for result in results for row in result["rows"]],
        "seconds": round(time.time() - started, 2),
    }
    models = [file for part in parts for name, file in sorted(part.files.items()) if name != "rows"]
    return Done(report, models, len(parts), len(new))


def masker(setting: Setting, job: SelfMaskingJob, number: int) -> Callable[[tuple[str, float]], Part]:
    store, school = setting.store, School(setting, job)
    network = setting.stored()
    of = digest_of(state_of(network))

    def learned(item: tuple[str, float]) -> Part:
        key, lr = item
        started = time.time()
        examples, classes = school.examples(job.task)
        task = make_task(job.task, network, school.width(network), classes, job.seed, job.prototypes, job.queue)
        recipe = Recipe(job.steps, lr, 0.0, job.warmup, job.seed)
        rows: list[dict[str, Any]] = []
        files: dict[str, File] = {}
        try:
            masks, loss = learn_masks(network, task, examples, recipe, job.head_lr)
        except NotLearnedError as error:  # a sweep is meant to find such rates
            told_why = json.dumps({"rows": rows, "refused": str(error)}).encode()
            files["rows"] = kept_file(store, LEARNED, key, "rows.json", told_why)
            return store.commit_part(LEARNED, key, {}, {"images": 0}, time.time() - started, files=files)
        for method, chosen in ((f"masks, {job.task}", masks), ("masks, at random", at_random(masks, job.seed))):
            name = f"masks-{job.task}" if chosen is masks else "masks-random"
            folder = f"{setting.folder}/job-{number}/{name}-{lr!r}-{key[:8]}"
            made_of = masked_network(network, chosen)
            row, row_files = _row(setting, made_of, network, {"pruned": 0, "dense": 0}, chosen, of, folder, job.seed)
            files |= {f"{name}/{file}": at for file, at in row_files.items()}
            sizes = {
                "masks_bytes": row_files[MASKS].size_bytes,
                "weights_bytes": sum(4 * weight.numel() for weight in maskable(network).values()),
            }
            rows.append({"method": method, "lr": lr, **row, **sizes, "loss": loss if chosen is masks else None})
        rows[0]["seconds"] = rows[1]["seconds"] = round(time.time() - started, 2)
        files["rows"] = kept_file(
            store, LEARNED, key, "rows.json", json.dumps({"rows": rows}, indent=1).encode(), len(rows)
        )
        return store.commit_part(LEARNED, key, {}, {"images": 0}, time.time() - started, files=files)

    return learned
