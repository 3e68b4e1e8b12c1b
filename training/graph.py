"""The training half of the DAG: shards -> `train` -> `finish` -> `distill`, as far as configured, and `evaluate`."""

from __future__ import annotations

import contextlib
import functools
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.config import TargetSet
from lodeset.pipeline.dag.background import repeating
from lodeset.pipeline.dag.fingerprint import digest, file_digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Input, Outcome, Progress, Stage
from lodeset.pipeline.dag.store import File, Part, Rows, Store
from lodeset.pipeline.engines.ray import job, map_with_state
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.stages.embed import read_vectors
from lodeset.pipeline.stages.write_shards import IMAGES
from lodeset.training import cost
from lodeset.training.checkpoint import MARKER
from lodeset.training.config import TrainingConfig, distilling, finishing, identity_of
from lodeset.training.export import CONFIG, PREPROCESSOR, WEIGHTS, load_backbone
from lodeset.training.index import Shards
from lodeset.training.labelled import GALLERY, TEST, Target, read_target, unknown_classes
from lodeset.training.launch import launch
from lodeset.training.linear import Probe, linear_probe, probe_features
from lodeset.training.lines import last_line
from lodeset.training.metrics import FILE as METRICS
from lodeset.training.origin import Origin
from lodeset.training.pictures import picture_table
from lodeset.training.ssl import student_and_teacher
from lodeset.training.targets import Block, accuracies, feature_worker, in_order, read_features, unit
from lodeset.training.vit import DinoVisionTransformer
from lodeset.training.weights import check_weights, identity, load_weights

TRAIN_VERSION = 4
EVALUATE_VERSION = 3
SELECTED = "selected"  # which set wants which image, where sets are weighed
FEATURES, PICTURES = "evaluate_features", "evaluate_pictures"
PICTURED = 8  # images of a target set in pictures
ENLARGED = 2  # times the side that the network was trained at, for pictures
# What `evaluate` calls the network of each stage that trains, the same network before, and the embedder that curated.
NETWORKS = {"train": "trained", "finish": "finished", "distill": "distilled"}
UNTRAINED, EMBEDDER = "untrained", "embedder"
IMAGES_PER_PART = 32
LONGER = "from the first step on (`training.weights` goes on from a model instead)"
EVALUATED = 0.3  # two networks' features of an image, as a share of a training image's time: the demo, 2 CPU cores


def build(
    config: TrainingConfig | None, targets: Sequence[TargetSet], curation: Mapping[str, Stage], max_pixels: int
) -> dict[str, Stage]:
    """`train`, where it is configured, and `evaluate`, where there are target sets.

    `max_pixels` is the limit that the target sets' images were ingested with; `training` has its own for what it trains on.
    """
    stages: dict[str, Stage] = {}
    if config is not None:
        data = {"shards": Input(curation["write_shards/all"], IMAGES)}
        if config.mix:
            data[SELECTED] = Input(curation["retrieve/all"])
        train = _training("train", config, data)
        stages[train.id] = last = train
        if config.finish is not None:
            stages["finish/all"] = last = _training("finish", finishing(config), data, last)
        if config.distill is not None:
            stages["distill/all"] = _training("distill", distilling(config), data, last)
    trained = {stage.name: Input(stage) for stage in stages.values()}
    if targets:
        evaluate = Stage(
            "evaluate",
            "all",
            EVALUATE_VERSION,
            "ray",
            run_evaluate,
            config={"targets": [t.model_dump(include={"name", "label", "split", "linear_steps"}) for t in targets]},
            inputs={
                **trained,
                **{f"images:{t.name}": Input(curation[f"ingest/{t.name}"], "metadata") for t in targets},
                **{f"vectors:{t.name}": Input(curation[f"embed/{t.name}"]) for t in targets},
            },
            speed={
                "training": {stage.name: stage.speed["training"] for stage in stages.values()},
                "targets": tuple(targets),
                "max_pixels": max_pixels,
            },
            seconds_per_image=EVALUATED * cost.seconds_per_image(config) if config is not None else 0.0,
        )
        stages[evaluate.id] = evaluate
    return stages


# -- train, finish, distill


def _training(name: str, config: TrainingConfig, data: Mapping[str, Input], before: Stage | None = None) -> Stage:
    """A run of `config` on `data`, from the networks of the stage `before`: `distill` learns from them, others go on with them."""
    tree = identity_of(config)
    if config.weights is not None:
        check_weights(config.weights.path, config.model)  # now, not when days of curation are over
        tree["weights"] = identity(config.weights.path)
    of: TrainingConfig | None = before.speed["training"] if before is not None else None
    return Stage(
        name,
        "all",
        TRAIN_VERSION,
        "ray",
        run_train,
        config=tree,
        inputs={**data, **({"before": Input(before)} if before is not None else {})},
        speed={"training": config, "before": of},
        seconds_per_image=cost.seconds_per_image(config, teacher=of if name == "distill" else None),
        work=config.steps * config.batch,
        size_bytes=cost.stored_bytes(config),
        advice={"steps": LONGER} if name == "train" and config.weights is None else {},
    )


def folder_of(store: Store, fingerprint: str) -> Path:
    """Where a run's checkpoints, metrics and export lie."""
    if not store.local:
        raise LodesetError(
            f"training writes checkpoints to a file system that all workers mount, and {store.url} is not one: "
            "use a path as `store:` for runs with `training:`"
        )
    return Path(store.path(f"training/{fingerprint[:16]}"))


def run_train(context: Context) -> Outcome:
    config: TrainingConfig = context.speed["training"]
    store, shards = context.store, context.inputs["shards"]
    folder = folder_of(store, context.fingerprint)
    selected = context.inputs[SELECTED].tables["selected"] if SELECTED in context.inputs else ()
    _whole(store, (*shards.tables["index"], *selected))
    found = Shards(
        index=(store.full_url(shards.tables["index"][0].path),),
        selected=tuple(store.full_url(file.path) for file in selected),
    )

    def report(share: float, images: int) -> None:
        context.report(Progress(share, images))

    with job(context.ray_address), following(report, folder, config):
        summary = launch(config, found, folder, context.cpus, _origin(context))
    model = (WEIGHTS, CONFIG, PREPROCESSOR)
    names = (*model, METRICS, "summary.json")
    files = {name: _file(store, folder / name, rows=0) for name in names}
    images = shards.rows.kept
    return Outcome(
        tables={
            "model": tuple(files[name] for name in model),
            "metrics": (files[METRICS], files["summary.json"]),
            "checkpoints": _checkpoint(store, folder, config.steps),
        },
        rows=Rows(taken=images, kept=images),
        details={
            **summary,
            "folder": store_relative(store, folder),
            "work": context.stage.work,
            "warnings": _skipped(int(summary["skipped"])),
        },
    )


def _whole(store: Store, files: Sequence[File]) -> None:
    """Raises DamagedError: one of these is missing, or not what was written. What reads them next looks at no digest."""
    for file in files:
        store.check(file)


def _skipped(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{count} times an image of the shards could not be read, or was not what was written, and another one stood in for it: "
        "`lodeset verify --deep` says which shards are damaged, and `lodeset run` writes these again"
    ]


def _origin(context: Context) -> Origin | None:
    before = context.inputs.get("before")
    if before is not None:
        marker = before.tables["checkpoints"][0]
        _whole(context.store, before.tables["checkpoints"])
        path = posixpath.dirname(context.store.path(marker.path))
        distil = context.stage.name == "distill"
        return Origin(path=path, digest=marker.sha256, of=context.speed["before"], distil=distil)
    weights = context.speed["training"].weights
    return Origin(path=weights.path, digest=context.stage.config["weights"]) if weights is not None else None


def store_relative(store: Store, path: Path) -> str:
    return path.relative_to(store.root).as_posix()


def _file(store: Store, path: Path, rows: int) -> File:
    return File(store_relative(store, path), rows, path.stat().st_size, file_digest(str(path)))


def _checkpoint(store: Store, folder: Path, step: int) -> tuple[File, ...]:
    """The files of a step's checkpoint, its manifest first. Digests are those in it: the files can be gigabytes."""
    path = folder / f"step-{step:07d}"
    marker = _file(store, path / MARKER, rows=0)
    told = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
    files = (
        File(store_relative(store, path / name), 0, one["size_bytes"], one["sha256"]) for name, one in told.items()
    )
    return (marker, *files)


@contextlib.contextmanager
def following(report: Callable[[float, int], None], folder: Path, config: TrainingConfig) -> Iterator[None]:
    """Reports the share of the steps that is done, and images since it looked first, from the last line of metrics.jsonl, which worker 0
    writes wherever it runs."""
    start: int | None = None

    def look() -> float:
        nonlocal start
        line = last_line(folder / METRICS)
        step = line["step"] if line is not None else 0
        start = step if start is None else start
        report(step / config.steps, max(0, step - start) * config.batch)
        return 1.0

    with repeating(look, 1.0):
        yield


# -- evaluate


@dataclass(frozen=True)
class Trained:
    """A network to evaluate: what its bytes are, its configuration, and where it lies; none: as it was before training."""

    digest: str
    config: TrainingConfig
    folder: str | None

    @property
    def size(self) -> int:
        return self.config.crops.global_size


def run_evaluate(context: Context) -> Outcome:
    """kNN and linear probes on each target set: the embedder that curated and, after training, every trained network and the first untrained."""
    store = context.store
    targets: list[Target] = []
    left_out: dict[str, int] = {}
    taken = 0
    for one in context.speed["targets"]:
        ingested = context.inputs[f"images:{one.name}"]
        target, reasons = read_target(store, ingested, one.name, one.label, one.split)
        targets.append(target)
        taken += ingested.rows.kept
        for reason, count in reasons.items():
            left_out[reason] = left_out.get(reason, 0) + count

    networks = _networks(context) if context.speed["training"] else {}
    seen, new = _seen(context, targets, networks) if networks else ({}, set())
    scores: dict[str, dict[str, Any]] = {}
    for target in targets:
        found: dict[str, Mapping[str, float]] = {}
        linear: dict[str, dict[str, Any]] = {}
        inputs: dict[str, dict[str, NDArray[np.float32]]] = {}
        for (name, network), parts in seen.items():
            if name == target.name:
                layered = read_features(store, parts, target.ids, networks[network].config.model.dim)
                found[network] = accuracies(target, unit(layered[:, -2]))
                inputs[network] = probe_features(layered[:, :-1], layered[:, -1])
        ids, matrix = read_vectors(store, context.inputs[f"vectors:{target.name}"].tables["vectors"])
        if set(target.ids) <= set(ids):
            vectors = unit(in_order(ids, matrix, target.ids))
            # Of the length that LayerNorm gives the features beside them: learning rates mean the same.
            scaled = vectors * np.float32(np.sqrt(vectors.shape[1]))
            found[EMBEDDER], inputs[EMBEDDER] = accuracies(target, vectors), {"vector": scaled}
        if one.linear_steps:
            rows = (target.rows(GALLERY), target.rows(TEST))
            linear = {n: _told(linear_probe(x, target.labels, *rows, one.linear_steps)) for n, x in inputs.items()}
        scores[target.name] = {
            "knn": found,
            "linear": linear,
            "gallery": len(target.rows(GALLERY)),
            "test": len(target.rows(TEST)),
            "classes": len(set(target.labels)),
            **({"understood": dict(target.understood)} if target.understood else {}),
        }
    made_of = [part for parts in seen.values() for part in parts]
    warnings = [told for target in targets if (told := unknown_classes(target)) is not None]
    return Outcome(
        tables={
            "features": tuple(part.files["features"] for part in made_of),
            "pictures": tuple(_picture(context, target, networks) for target in targets) if networks else (),
        },
        rows=Rows(taken=taken, kept=sum(len(t.ids) for t in targets), dropped=left_out),
        details={
            "targets": scores,
            "parts": len(made_of),
            "parts_made": len(new),
            **({"warnings": warnings} if warnings else {}),
        },
    )


def _told(probe: Probe) -> dict[str, Any]:
    return {"accuracy": round(probe.accuracy, 4), "features": probe.features, "lr": probe.lr}


def _networks(context: Context) -> dict[str, Trained]:
    """What is evaluated, by the name it is told under."""
    configs = context.speed["training"]
    networks: dict[str, Trained] = {}
    for stage, config in configs.items():
        artifact = context.inputs[stage]
        _whole(context.store, artifact.tables["model"])
        folder = context.store.path(str(artifact.details["folder"]))
        networks[NETWORKS[stage]] = Trained(artifact.tables["model"][0].sha256, config, folder)
    first: TrainingConfig = configs["train"]
    told = context.stage.inputs["train"].stage.config
    start = digest(told["model"], first.seed, told.get("weights"))
    return networks | {UNTRAINED: Trained(start, first, None)}


def _seen(
    context: Context, targets: Sequence[Target], networks: Mapping[str, Trained]
) -> tuple[dict[tuple[str, str], list[Part]], set[str]]:
    """The features of each target set by each network, by (target, network); what is new."""
    store = context.store
    blocks = {(t.name, n): _blocks(t, n, network) for t in targets for n, network in networks.items()}
    work = [(block.key, block, len(block.places)) for some in blocks.values() for block in some]
    make = functools.partial(feature_worker, store, FEATURES, networks, _load, context.speed["max_pixels"])
    parts, new = made(
        context, FEATURES, work, functools.partial(map_with_state, make, cpus=context.cpus, address=context.ray_address)
    )
    by_key = {part.key: part for part in parts}
    return {which: [by_key[block.key] for block in some] for which, some in blocks.items()}, new


def _picture(context: Context, target: Target, networks: Mapping[str, Trained]) -> File:
    """The first test images by the network that was trained last, as colours."""
    name = next(name for name in reversed(NETWORKS.values()) if name in networks)
    network, places = networks[name], [target.places[row] for row in target.rows(TEST)[:PICTURED]]
    key = digest(PICTURES, EVALUATE_VERSION, network.digest, name, target.name, ENLARGED, [p.image_id for p in places])
    part = context.store.part(PICTURES, key)
    if part is None:
        size, limit = ENLARGED * network.size, context.speed["max_pixels"]
        table = picture_table(_load(network), name, target.name, places, size, limit)
        part = context.store.commit_part(PICTURES, key, {"pictures": table})
    return part.files["pictures"]


def _blocks(target: Target, name: str, network: Trained) -> list[Block]:
    runs = [target.places[i : i + IMAGES_PER_PART] for i in range(0, len(target.places), IMAGES_PER_PART)]
    keys = (digest(FEATURES, EVALUATE_VERSION, network.digest, network.size, [p.image_id for p in run]) for run in runs)
    return [Block(key, name, run) for key, run in zip(keys, runs, strict=True)]


def _load(network: Trained) -> DinoVisionTransformer:
    if network.folder is not None:
        return load_backbone(Path(network.folder))
    weights = network.config.weights
    if weights is not None:
        return load_weights(weights.path, network.config.model)
    _, teacher = student_and_teacher(network.config)
    return teacher.backbone.eval()
