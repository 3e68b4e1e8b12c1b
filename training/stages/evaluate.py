"""evaluate (Ray Data): frozen features of target sets -> kNN accuracies and linear probes of every network."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import File, Part, Rows
from lodeset.pipeline.dag.stored import Stored, stored
from lodeset.pipeline.engines.ray import map_with_state
from lodeset.pipeline.tables.vectors import read_vectors
from lodeset.training.backbone import Backbone
from lodeset.training.config import TrainingConfig
from lodeset.training.export import load_backbone
from lodeset.training.labelled import GALLERY, TEST, Target, read_target, unknown_classes
from lodeset.training.linear import Probe, linear_probe, probe_features
from lodeset.training.pictures import picture_table
from lodeset.training.specs import EvaluateRuntime, EvaluateSpec
from lodeset.training.ssl import student_and_teacher
from lodeset.training.stages.train import check_whole
from lodeset.training.targets import Block, accuracies, feature_worker, in_order, read_features, unit
from lodeset.training.weights import load_weights

VERSION = EvaluateSpec.VERSION
FEATURES, PICTURES = "evaluate_features", "evaluate_pictures"
PICTURED = 8  # images of a target set in pictures
ENLARGED = 2  # times the side that the network was trained at, for pictures
# What `evaluate` calls the network of each stage that trains, the same network before, and the embedder that curated.
NETWORKS = {"train": "trained", "finish": "finished", "distill": "distilled"}
UNTRAINED, EMBEDDER = "untrained", "embedder"
IMAGES_PER_PART = 32


@dataclass(frozen=True)
class Trained:
    """A network to evaluate: what its bytes are, its configuration, and where it is; None: as it was before training."""

    digest: str
    config: TrainingConfig
    model: Stored | None

    @property
    def size(self) -> int:
        return self.config.crops.global_size


def run(context: Context[EvaluateSpec, EvaluateRuntime]) -> Outcome:
    """kNN and linear probes on each target set: the embedder that curated and, after training, every trained network and the first untrained."""
    store = context.store
    targets: list[Target] = []
    left_out: dict[str, int] = {}
    taken = 0
    for one in context.spec.targets:
        ingested = context.inputs[f"images:{one.name}"]
        target, reasons = read_target(store, ingested, one.name, one.label, one.split)
        targets.append(target)
        taken += ingested.rows.kept
        for reason, count in reasons.items():
            left_out[reason] = left_out.get(reason, 0) + count

    networks = _networks(context) if context.runtime.training else {}
    seen, new = _seen(context, targets, networks) if networks else ({}, set())
    scores: dict[str, dict[str, Any]] = {}
    for chosen, target in zip(context.spec.targets, targets, strict=True):
        found: dict[str, Mapping[str, float]] = {}
        linear: dict[str, dict[str, Any]] = {}
        inputs: dict[str, dict[str, NDArray[np.float32]]] = {}
        for (name, network), parts in seen.items():
            if name == target.name:
                layered = read_features(store, parts, target.ids, networks[network].config.network.dim)
                found[network] = accuracies(target, unit(layered[:, -2]))
                inputs[network] = probe_features(layered[:, :-1], layered[:, -1])
        ids, matrix = read_vectors(store, context.inputs[f"vectors:{target.name}"].tables["vectors"])
        if set(target.ids) <= set(ids):
            vectors = unit(in_order(ids, matrix, target.ids))
            # Of the length that LayerNorm gives the features beside them: learning rates mean the same.
            scaled = vectors * np.float32(np.sqrt(vectors.shape[1]))
            found[EMBEDDER], inputs[EMBEDDER] = accuracies(target, vectors), {"vector": scaled}
        if chosen.linear_steps:
            rows = (target.rows(GALLERY), target.rows(TEST))
            linear = {n: _told(linear_probe(x, target.labels, *rows, chosen.linear_steps)) for n, x in inputs.items()}
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


def _networks(context: Context[EvaluateSpec, EvaluateRuntime]) -> dict[str, Trained]:
    """What is evaluated, by the name it is told under."""
    specs = context.runtime.training
    networks: dict[str, Trained] = {}
    for stage, spec in specs.items():
        artifact = context.inputs[stage]
        model = artifact.tables["model"]
        if context.store.local:  # of a remote store, each machine checks what it copies
            check_whole(context.store, model)
        networks[NETWORKS[stage]] = Trained(model[0].sha256, spec.config, stored(context.store, model))
    first = specs["train"]
    architecture = first.identity().get("backbone", first.identity().get("model"))
    start = digest(architecture, first.config.seed, first.weights)
    return networks | {UNTRAINED: Trained(start, first.config, None)}


def _seen(
    context: Context, targets: Sequence[Target], networks: Mapping[str, Trained]
) -> tuple[dict[tuple[str, str], list[Part]], set[str]]:
    """The features of each target set by each network, by (target, network); what is new."""
    store = context.store
    blocks = {(t.name, n): _blocks(t, n, network) for t in targets for n, network in networks.items()}
    work = [(block.key, block, len(block.places)) for some in blocks.values() for block in some]
    make = functools.partial(feature_worker, store, FEATURES, networks, _load, context.runtime.max_pixels)
    parts, new = made(
        context,
        FEATURES,
        work,
        functools.partial(
            map_with_state,
            make,
            cpus=context.cpus,
            address=context.ray_address,
            seconds=lambda block: 0.01 * len(block.places),
        ),
    )
    by_key = {part.key: part for part in parts}
    return {which: [by_key[block.key] for block in some] for which, some in blocks.items()}, new


def _picture(context: Context, target: Target, networks: Mapping[str, Trained]) -> File:
    """The first test images by the network that was trained last, as colours."""
    name = next(name for name in reversed(NETWORKS.values()) if name in networks)
    network, places = networks[name], [target.places[row] for row in target.rows(TEST)[:PICTURED]]
    key = digest(PICTURES, VERSION, network.digest, name, target.name, ENLARGED, [p.image_id for p in places])
    part = context.store.part(PICTURES, key)
    if part is None:
        size, limit = ENLARGED * network.size, context.runtime.max_pixels
        table = picture_table(_load(network), name, target.name, places, size, limit)
        part = context.store.commit_part(PICTURES, key, {"pictures": table})
    return part.files["pictures"]


def _blocks(target: Target, name: str, network: Trained) -> list[Block]:
    runs = [target.places[i : i + IMAGES_PER_PART] for i in range(0, len(target.places), IMAGES_PER_PART)]
    keys = (digest(FEATURES, VERSION, network.digest, network.size, [p.image_id for p in run]) for run in runs)
    return [Block(key, name, run) for key, run in zip(keys, runs, strict=True)]


def _load(network: Trained) -> Backbone:
    if network.model is not None:
        with network.model.here() as folder:
            return load_backbone(folder)
    weights = network.config.weights
    if weights is not None:
        return load_weights(weights.path, network.config.model)
    _, teacher = student_and_teacher(network.config)
    return teacher.backbone.eval()
