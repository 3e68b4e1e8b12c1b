"""Run the whole DAG on the sample world, and compare the result with the truth."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from lodeset.infra.config import usable_cpus
from lodeset.infra.demo.truth import Truth, is_made, load_truth
from lodeset.infra.demo.world import FULL_SIZE, make_world, write_config
from lodeset.infra.report.render import write_report
from lodeset.infra.session import open_config, run
from lodeset.pipeline import own
from lodeset.pipeline.dag.runner import Event
from lodeset.pipeline.dag.stage import Outcome, Progress, Stage, read_as
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.errors import ConfigError, GateError
from lodeset.pruning.choosing.criteria import CRITERIA, METHODS, REFIT
from lodeset.pruning.specs import PruneDetails
from lodeset.training.specs import EvaluateDetails

Lines = dict[str, list[str]]
K = "10"  # number of neighbors of the reported accuracies
JUDGED = ("dedup/pool", "retrieve/alpha", "retrieve/beta", "train/all", "evaluate/all", "prune/all")


def run_demo(folder: Path, watch: Callable[[Event], None], seed: int = 0) -> dict[str, Any]:
    """Make the sample world of a seed (unless it exists), run everything, and evaluate the result.

    Raises:
        LodesetError: the folder is in use or cannot be written, or a stage failed.
        ConfigError: the folder's configuration was changed and lacks stages that are evaluated.
        GateError: a reference image, or a copy of one, reached the shards.
    """
    started = time.time()
    truth = load_truth(folder) if is_made(folder) else drawn(folder, watch, seed)
    own.mark(folder, "demo", filled=True)
    config = folder / "lodeset.yaml"
    if not config.exists():
        write_config(folder)
    opened = open_config(config)
    lacking = [id_ for id_ in JUDGED if id_ not in opened.stages]
    if lacking:
        raise ConfigError(
            f"{config} no longer makes {', '.join(lacking)}: remove it, and the demo writes its own again"
        )
    artifacts = run(opened, watch)
    report = write_report(opened.store, opened.stages, artifacts, folder / "report.html", "sample world")
    judged = judge(opened.store, artifacts, truth)
    judged["lines"]["report"] = [str(report)]
    judged["lines"]["took"] = [f"{time.time() - started:.0f} s"]
    if judged["leaked"]:
        raise GateError(
            f"{judged['leaked']} images that are copies of reference images reached the shards; see {report}"
        )
    return judged


def drawn(folder: Path, watch: Callable[[Event], None], seed: int, images: int = FULL_SIZE) -> Truth:
    """Draw the world, and report it as a stage."""
    started, cpus = time.time(), usable_cpus()
    stage = Stage("draw", "world", 1, "beam", lambda _: Outcome({}, Rows(0, 0)), {"seed": seed})

    def report(done: int, of: int) -> None:
        watch(Event("progress", stage, Progress(done / of, done)))

    watch(Event("started", stage, reason=f"{images:,} images for the pool, and companion sets, by {cpus} processes"))
    truth = make_world(folder, images, seed, cpus, report)
    world = Artifact(
        stage.name,
        stage.set,
        1,
        "",
        stage.config,
        {},
        {},
        Rows(truth.files, truth.files),
        seconds=time.time() - started,
    )
    watch(Event("done", stage, artifact=world))
    return truth


def judge(store: Store, artifacts: Mapping[str, Artifact], truth: Truth) -> dict[str, Any]:
    """Figures compared with the truth, and the lines that a person reads."""
    recall, precision, found_pairs = _duplicates(store, artifacts["dedup/pool"], truth)
    shards = set(store.table(artifacts["write_shards/all"].tables["index"], ["image_id"])["image_id"].to_pylist())
    leaked = len(shards & set(truth.leaked))
    purity = _purity(store, artifacts, truth)
    wanted = _wanted(shards, truth)
    knn = read_as(EvaluateDetails, artifacts["evaluate/all"].details).targets
    pruning = read_as(PruneDetails, artifacts["prune/all"].details).jobs
    lines: Lines = {
        "pool": _funnel(artifacts),
        "near-duplicates": [f"recall {recall:.3f}, precision {precision:.3f} of {found_pairs} pairs found"],
        "leaked reference images": [f"{leaked} in the shards, of {len(truth.leaked)} planted in the pool"],
        "retrieved": [
            f"{name}: {p['purity']:.0%} of {p['images']} images show {' or '.join(truth.curated[name])}, "
            f"compared with {p['base_rate']:.1%} of the pool ({p['purity'] / p['base_rate']:.1f} times as many)"
            for name, p in purity.items()
        ],
        "wanted images": [f"{wanted['pool']:.0%} of the pool -> {wanted['shards']:.0%} of what is trained on"],
        "kNN": [_knn(name, target) for name, target in knn.items()],
        "pruned": [line for job in pruning for line in _pruned(job)],
    }
    return {
        "recall": recall,
        "precision": precision,
        "leaked": leaked,
        "purity": purity,
        "wanted": wanted,
        "knn": knn,
        "pruning": pruning,
        "lines": lines,
    }


def _knn(name: str, target: Mapping[str, Any]) -> str:
    embedder, before, after = (_at_k(target["knn"][features]) for features in ("embedder", "untrained", "trained"))
    return (
        f"{name}: model {before:.3f} untrained -> {after:.3f} trained; embedder {embedder:.3f} "
        f"({target['classes']} classes, {target['test']} images)"
    )


def _at_k(by_k: Mapping[str, float]) -> float:
    return by_k.get(K, next(iter(by_k.values())))


def _funnel(artifacts: Mapping[str, Artifact]) -> list[str]:
    lines = []
    for id_ in ("ingest/pool", "filter/pool", "dedup/pool", "retrieve/all", "write_shards/all"):
        rows = artifacts[id_].rows
        reasons = ", ".join(f"{reason} {count}" for reason, count in rows.dropped.items())
        lines.append(f"{id_}: {rows.taken} -> {rows.kept}" + (f" ({reasons})" if reasons else ""))
    return lines


def _pairs(groups: Iterable[Iterable[str]]) -> set[tuple[str, ...]]:
    return {pair for group in groups for pair in itertools.combinations(sorted(set(group)), 2)}


def _duplicates(store: Store, dedup: Artifact, truth: Truth) -> tuple[float, float, int]:
    """Recall and precision of near-duplicate pairs in the pool, over closed groups.

    Copies of one reference image are copies of each other whether they were planted or not, so pairs of leaked images
    are left out.
    """
    table = store.table(dedup.tables["duplicates"], ["image_id", "group_id"])
    groups: dict[str, list[str]] = {}
    for image_id, group_id in zip(table["image_id"].to_pylist(), table["group_id"].to_pylist(), strict=True):
        if image_id in truth.concepts and image_id not in truth.leaked:
            groups.setdefault(group_id, []).append(image_id)
    predicted, true = _pairs(groups.values()), _pairs(group.ids for group in truth.near)
    return len(predicted & true) / len(true), len(predicted & true) / max(1, len(predicted)), len(predicted)


def _purity(store: Store, artifacts: Mapping[str, Artifact], truth: Truth) -> dict[str, dict[str, float]]:
    """For each curated set: the share of its pool images that show its concepts, and the share of such images in the
    pool.
    """
    table = store.table(artifacts["retrieve/all"].tables["selected"], ["image_id", "set", "mode"]).to_pylist()
    purity = {}
    for name, concepts in truth.curated.items():
        got = [
            truth.concepts[r["image_id"]]
            for r in table
            if r["set"] == name and r["mode"] != "as_is" and r["image_id"] in truth.concepts
        ]
        everywhere = list(truth.concepts.values())
        purity[name] = {
            "images": len(got),
            "purity": sum(c in concepts for c in got) / max(1, len(got)),
            "base_rate": sum(c in concepts for c in everywhere) / len(everywhere),
        }
    return purity


def _wanted(shards: Set[str], truth: Truth) -> dict[str, float]:
    """The share of images with concepts of any curated set: in the pool, and among the pool's images in the shards."""
    wanted_concepts = {concept for concepts in truth.curated.values() for concept in concepts}
    selected = [truth.concepts[image_id] for image_id in shards & truth.concepts.keys()]
    everywhere = list(truth.concepts.values())
    return {
        "pool": sum(concept in wanted_concepts for concept in everywhere) / len(everywhere),
        "shards": sum(concept in wanted_concepts for concept in selected) / max(1, len(selected)),
    }


def _pruned(job: Mapping[str, Any]) -> list[str]:
    """One line per rung: the share removed, and the kNN of each way of choosing as many units, refitted."""
    target = next(iter(job["knn_dense"]), None)
    swept = "remove" if job["job"]["remove"] else "eps_w"
    lines = [] if target is None else [f"dense: kNN {_at_k(job['knn_dense'][target]):.3f}"]
    for point in sorted({v[swept] for v in job["variants"]}):
        at = {v["method"]: v for v in job["variants"] if v[swept] == point}
        removed = at[METHODS[0]]
        line = f"{removed['parameters_removed']:.0%} of parameters, {removed['macs_removed']:.0%} of MACs removed"
        if target is not None:
            knn = {criterion.name: _at_k(at[criterion.name + REFIT]["knn"][target]) for criterion in CRITERIA}
            line += ": " + ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in knn.items())
        lines.append(line)
    return lines
