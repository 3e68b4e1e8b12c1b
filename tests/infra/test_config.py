"""Configurations that cannot work are refused before anything is run, with the key, the value and the way out."""

from pathlib import Path

import pytest

from lodeset.infra.config import read
from lodeset.pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "training: {optimiser: {clip_norm: .inf}}",
            "training.optimiser.clip_norm = .inf: expected a finite number",
        ),
        ("training: {losses: {dino: .nan}}", "training.losses.dino = .nan"),
        (
            "training: {workers: 64}",
            "workers 64 cannot share a batch of 32 evenly with at least two images each: use workers 16, or batch 128",
        ),
        ("training: {workers: 32}", "workers 32 cannot share a batch of 32 evenly"),
        ("training: {workers: 3, batch: 2}", "use workers 1, or batch 6"),
        ("store: memory://x", "store memory://x: this is the memory of one process, and a run has several: use a path"),
        (
            "training: {mix: {flower: 2}}\ncurated: [{name: flowers, uri: f, include: true}]",
            "training.mix.flower: no curated set has this name: flowers",
        ),
        ("training: {mix: {flowers: -1}}", "training.mix.flowers = -1: expected a number of 0 or more"),
        ("pruning: [{}]", "needs a trained model: add `training: {recipe: tiny}`"),
        ("training: {}\npruning: [{checkpoint: finish}]", "pruning.0.checkpoint finish: no stage makes it: add"),
        (
            "training: {model: {heads: 1}}\npruning: [{targets: [heads]}]",
            "pruning.0.targets heads: the model has a single",
        ),
        (
            "training: {}\npruning: [{}, {calibration_images: 1}]",
            "pruning.1.calibration_images 1: 65 positions of each image cannot determine the 512 inputs of a layer",
        ),
        (
            "training: {}\npruning: [{positions_per_image: 1}]",
            "(its model's dim is 128): use calibration_images 514 or more",
        ),
        (
            "training: {}\npruning: [{method: lottery, tasks: [rotation, labels]}]",
            "pruning.0: labels come from a target set: add `targets`",
        ),
        (
            "training: {}\ntargets: [{name: birds, uri: b}]\npruning: [{method: self_masking, task: labels, target: bird}]",
            "pruning.0.target bird: no target set has this name: birds",
        ),
        (
            "training: {}\ntargets: [{name: birds, uri: b}]\npruning: [{method: self_masking, target: birds}]",
            "target: not used by task swav: remove it",
        ),
        (
            "training: {}\npruning: [{method: self_masking, task: labels, queue: 8, prototypes: 9}]",
            "prototypes, queue: not used by task labels",
        ),
        (
            "training: {}\npruning: [{method: lottery, target: birds, transfer: false}]",
            "target birds: no task uses its labels",
        ),
        (
            "training: {}\npruning: [{sweep: [0.1, 0.2], recover: {steps: 5, sweep: [0.3]}}]",
            "recover.sweep [0.3]: not among the strengths of sweep, [0.1, 0.2]",
        ),
        (
            "training: {}\npruning: [{remove: [0.4], recover: {steps: 5, sweep: [0.01]}}]",
            "recover.sweep [0.01]: not among the shares of remove, [0.4]",
        ),
        ("training: {}\npruning: [{remove: [40]}]", "pruning.0.remove.0 = 40: expected a number below 1"),
        (
            "training: {workers: 2}\npruning: [{recover: {steps: 5, batch: 7}}]",
            "pruning.0.recover: workers 2 cannot share a batch of 7",
        ),
        ("training: {}\npruning: [{method: lotery}]", "no such method: use one of entropic, lottery, self_masking"),
        (
            "training: {}\npruning: [{method: lottery, sweep: [1]}]",
            "pruning.0.sweep: unknown key; it belongs to another",
        ),
        (
            "training: {}\npruning: [{method: lottery, steps: 4, rewind: 0.9}]",
            "rewind 0.9 of 4 steps leaves no steps to train: lower it",
        ),
        ("pruning: [{sweep: [.inf]}]\ntraining: {}", "pruning.0.sweep.0 = .inf: expected a finite number"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "lodeset.yaml"
    path.write_text(f"pool: p\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert told in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "store: s3://bucket/runs",
        "training: {}\nstore: 's3://bucket/runs'",
        "training: {workers: 16}",
        "training: {workers: 1, batch: 3}",
        "training: {model: {ffn: swiglu}}\npruning: [{targets: [units, heads]}]",
        "training: {}\nstore: 'file:///tmp/runs'",
        "training: {}\npruning: [{method: lottery}, {method: self_masking}, {}]",
        "training: {}\ntargets: [{name: birds, uri: b}]\npruning: [{method: lottery, tasks: [labels], target: birds}]",
        "training: {model: {drop_path: 0.1}}\npruning: [{recover: {steps: 5}}, {recover: {steps: 5, how: finetune}}]",
        "training: {}\npruning: [{calibration_images: 8}, {calibration_images: 514, positions_per_image: 1}]",
    ],
)
def test_what_works_is_not_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lodeset.yaml"
    path.write_text(f"pool: p\n{text}\n")
    assert read(path).pool[0].uri == str(tmp_path / "p")
