"""Whole runs on a tiny model: learning, exact resume, checkpoints, failures, and the same over Ray Train."""

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from lodeset.pipeline.errors import LodesetError
from lodeset.training.checkpoint import (
    check_checkpoint,
    check_settings,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from lodeset.training.config import TrainingConfig, identity_of
from lodeset.training.data import Batches
from lodeset.training.export import load_backbone
from lodeset.training.index import Shards, open_index
from lodeset.training.launch import launch, plan_workers, train_inline
from lodeset.training.objectives.dinov2 import DINOV2, losses
from lodeset.training.schedules import StepValues, step_values
from lodeset.training.ssl import clip_gradients, fresh, make_optimiser, schedule, student_and_teacher, update_teacher


def at_temperature(config: TrainingConfig, temperature: float) -> StepValues:
    return replace(step_values(config, 0), teacher_temperature=temperature)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / f"step-{step:07d}", "")


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(
    tmp_path: Path,
    shards: Shards,
    small: TrainingConfig,
    interrupted: Callable[[int], AbstractContextManager[None]],
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    summary = train_inline(small, shards, unbroken)

    with interrupted(5):
        train_inline(small, shards, broken)
    assert [line["step"] for line in metrics(broken)] == [1, 2, 3, 4, 5]
    resumed = train_inline(small, shards, broken)

    assert (summary["resumed_step"], resumed["resumed_step"]) == (0, 3)
    assert_same_bits(state_of(unbroken, 6), state_of(broken, 6))
    assert (unbroken / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    timed = "images_per_s"
    lines = [[{k: v for k, v in line.items() if k != timed} for line in metrics(f)] for f in (unbroken, broken)]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in broken.glob("step-*")) == ["step-0000003", "step-0000006"]


def test_the_export_is_the_teacher(tmp_path: Path, shards: Shards, small: TrainingConfig) -> None:
    train_inline(small, shards, tmp_path)
    exported = load_backbone(tmp_path).state_dict()
    saved = state_of(tmp_path, 6)
    assert_same_bits(exported, {name: saved[f"teacher.backbone.{name}"] for name in exported})


def test_losses_fall_on_a_batch_seen_again_and_again(shards: Shards, small: TrainingConfig) -> None:
    nets = fresh(small)
    batch = Batches(open_index(shards.index), small, 0, 1).load(0)
    optimiser = make_optimiser(nets.student, small.optimiser)
    for parameters in optimiser.param_groups:
        parameters["lr"] = 3e-3
    totals = []
    for step in range(40):
        torch.manual_seed(step)
        seen = losses(nets, batch, at_temperature(small, 0.07), small, None)
        totals.append(float(seen.total.detach()))
        optimiser.zero_grad()
        torch.autograd.backward(seen.total)
        optimiser.step()
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5])


def test_bf16_losses_are_near_those_of_fp32(shards: Shards, small: TrainingConfig) -> None:
    nets = fresh(small)
    nets.student.eval()  # no stochastic depth
    batch = Batches(open_index(shards.index), small, 0, 1).load(0)
    half = small.model_copy(update={"precision": "bf16"})
    exact, near = (losses(nets, batch, at_temperature(config, 0.07), config, None).terms for config in (small, half))
    for name in exact:
        assert exact[name] != near[name]
        torch.testing.assert_close(exact[name], near[name], rtol=0.1, atol=0.02)


def test_parameter_groups_follow_depth_and_kind(small: TrainingConfig) -> None:
    student, _ = student_and_teacher(small)
    optimiser = make_optimiser(student, small.optimiser)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    of = {names[id(p)]: group for group in optimiser.param_groups for p in group["params"]}
    assert of.keys() == set(names.values())
    values = step_values(small, 3)
    schedule(optimiser, values)
    expected = {  # name: (learning-rate factor at depth 2 and decay 0.9, decays)
        "backbone.patch_embed.proj.weight": (small.optimiser.patch_embed_lr * 0.9**3, True),
        "backbone.cls_token": (0.9**3, True),
        "backbone.blocks.0.attn.qkv.weight": (0.9**2, True),
        "backbone.blocks.1.mlp.fc1.bias": (0.9, False),
        "backbone.blocks.1.ls2.gamma": (0.9, False),
        "backbone.norm.weight": (1.0, False),
        "dino_head.mlp.0.weight": (1.0, True),
    }
    for name, (factor, decays) in expected.items():
        assert of[name]["lr"] == pytest.approx(values.lr * factor)
        assert of[name]["weight_decay"] == (values.weight_decay if decays else 0)


def test_prototypes_stand_still_at_first() -> None:
    config = TrainingConfig.model_validate({"steps": 100, "optimiser": {"freeze_last_layer": 0.05, "warmup": 0.1}})
    values = [step_values(config, step) for step in range(100)]
    assert [v.prototypes_lr == 0 for v in values] == [True] * 5 + [False] * 95
    peak = config.optimiser.base_lr * (config.batch / 1024) ** 0.5
    assert max(v.lr for v in values) == values[10].lr == pytest.approx(peak)
    assert values[5].lr == pytest.approx(peak / 2) and values[99].lr < 0.01 * peak
    assert [v.teacher_temperature for v in values[:31:15]] == pytest.approx([0.04, 0.055, 0.07])
    assert values[0].momentum == config.teacher.momentum_start and values[99].momentum > 0.9999


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    identity = {"seed": 1}
    assert newest_checkpoint(tmp_path, identity) is None
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, identity, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000002", "step-0000003", "step-0000004"]
    (tmp_path / "step-0000004" / "manifest.json").unlink()
    (state,) = (tmp_path / "step-0000003").glob("*.safetensors")
    flipped = bytearray(state.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    state.write_bytes(flipped)
    found = newest_checkpoint(tmp_path, identity)
    assert found is not None and found[0] == 2 and int(read_checkpoint(found[1], "")["x"]) == 2
    save_checkpoint(tmp_path, 4, {"x": torch.tensor(40)}, identity, keep=3)
    found = newest_checkpoint(tmp_path, identity)
    assert found is not None and int(read_checkpoint(found[1], "")["x"]) == 40


@pytest.mark.parametrize("text", ["[]", '{"files": []}', '{"step": 1, "files": {}, "identity": 3}', "\xff", ""])
def test_a_marker_that_says_nothing_is_none(tmp_path: Path, text: str) -> None:
    path = save_checkpoint(tmp_path, 1, {"x": torch.tensor(1)}, {}, keep=1)
    (path / "manifest.json").write_bytes(text.encode("latin-1"))
    assert newest_checkpoint(tmp_path, {}) is None


def test_tensors_that_the_marker_does_not_tell_of_are_not_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"x": torch.tensor(1)}, {}, keep=1)
    assert newest_checkpoint(tmp_path, {}) == (1, path)
    (file,) = path.glob("*.safetensors")
    (path / "zz.safetensors").write_bytes(file.read_bytes())
    assert newest_checkpoint(tmp_path, {}) is None
    with pytest.raises(LodesetError, match="is damaged"):
        check_checkpoint(path)


def test_a_damaged_checkpoint_does_not_outlive_the_run_that_passed_it_over(tmp_path: Path) -> None:
    identity = {"seed": 1}
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, identity, keep=2)
    (tmp_path / "step-0000002" / "manifest.json").unlink()
    (tmp_path / ".step-0000002.tmp").mkdir()  # and a save that was killed
    save_checkpoint(tmp_path, 2, {"x": torch.tensor(20)}, identity, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002"]
    (tmp_path / "step-0000002" / "manifest.json").unlink()
    save_checkpoint(tmp_path, 1, {"x": torch.tensor(10)}, identity, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    found = newest_checkpoint(tmp_path, identity)
    assert found is not None and int(read_checkpoint(found[1], "")["x"]) == 10


def test_other_settings_do_not_resume(tmp_path: Path, shards: Shards, small: TrainingConfig) -> None:
    train_inline(small, shards, tmp_path)
    faster = small.model_copy(update={"loader_processes": 1, "log_every": 2})
    again = train_inline(faster, shards, tmp_path)
    assert again["resumed_step"] == 6 and again["images_per_s"] > 0 and set(again["losses"]) >= {"loss", "dino"}
    with pytest.raises(LodesetError, match="seed: 0 -> 7"):
        train_inline(small.model_copy(update={"seed": 7}), shards, tmp_path)


def test_a_loss_that_is_not_finite_names_its_images(
    tmp_path: Path, shards: Shards, small: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(nets, batch, values, config, group):  # type: ignore[no-untyped-def]  # a stand-in
        seen = losses(nets, batch, values, config, group)
        if batch.step == 2:
            seen.terms["ibot"] = seen.terms["ibot"] * float("nan")
        return seen

    monkeypatch.setattr("lodeset.training.loop.objective_of", lambda _: replace(DINOV2, losses=poisoned))
    with pytest.raises(LodesetError, match="ibot became nan on worker 0 at step 2"):
        train_inline(small, shards, tmp_path)
    told = json.loads((tmp_path / "nonfinite-step-0000002-worker-0.json").read_text())
    assert tuple(told["image_ids"]) == Batches(open_index(shards.index), small, 0, 1).load(2).image_ids
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("batch", "cpus", "gpus", "workers"), [(32, 3, 0, 2), (32, 2, 0, 2), (2, 8, 0, 1), (32, 64, 4, 4)]
)
def test_all_of_the_budget_that_divides_the_batch(batch: int, cpus: int, gpus: int, workers: int) -> None:
    assert plan_workers(TrainingConfig(batch=batch), cpus, gpus) == workers


def test_more_workers_than_the_budget_are_refused() -> None:
    with pytest.raises(LodesetError, match="workers 4 exceeds the budget of 2 CPU cores"):
        plan_workers(TrainingConfig(workers=4), 2, 0)


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    import ray  # seconds, which only slow tests need to spend

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.slow  # starting Ray and its workers takes most of a minute on two cores
def test_two_workers_on_ray(tmp_path: Path, shards: Shards, small: TrainingConfig, two_cores: None) -> None:
    summary = launch(small, shards, tmp_path / "run", cpus=2)
    assert summary["workers"] == 2 and summary["images_seen"] == 48
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(LodesetError, match=r"^22 images are fewer than one batch of 30"):
        launch(small.model_copy(update={"batch": 30}), shards, tmp_path / "few", cpus=2)


@pytest.mark.slow  # two starts of Ray Train's workers
def test_a_killed_worker_costs_at_most_one_checkpoint_interval(
    tmp_path: Path, shards: Shards, small: TrainingConfig, two_cores: None
) -> None:
    """One of two is killed after the first checkpoint: the run ends by itself with the weights of an unbroken one."""
    config = small.model_copy(update={"steps": 60, "checkpoint_every": 5, "keep_checkpoints": 20})
    before = launch(config, shards, tmp_path / "unbroken", cpus=2)
    folder = tmp_path / "killed"
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 300
        while not list(folder.glob("step-*")):
            assert time.monotonic() < deadline, "no checkpoint appeared"
            time.sleep(0.01)
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
        os.kill(workers[-1].pid, signal.SIGKILL)
        killed.append(max(int(path.name.removeprefix("step-")) for path in folder.glob("step-*")))

    killer = threading.Thread(target=kill)
    killer.start()
    after = launch(config, shards, folder, cpus=2)
    killer.join()
    assert (before["restarts"], after["restarts"]) == (0, 1)
    assert after["resumed_step"] >= killed[0] > 0
    assert [line["step"] for line in metrics(folder)] == list(range(1, 61))
    assert_same_bits(state_of(tmp_path / "unbroken", 60), state_of(folder, 60))
    with pytest.raises(LodesetError, match="lost a worker 1 times without a checkpoint in between"):
        killer = threading.Thread(target=kill)
        folder = tmp_path / "stopped"
        killer.start()
        launch(config.model_copy(update={"max_failures": 0}), shards, folder, cpus=2)


@pytest.mark.slow  # two starts of Ray Train's workers
def test_a_worker_killed_before_its_first_step_is_replaced(
    tmp_path: Path, shards: Shards, small: TrainingConfig, two_cores: None
) -> None:
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 300
        while not killed and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = launch(small, shards, tmp_path / "run", cpus=2)
    killer.join()
    # Ray Train starts the workers again by itself, if they were not all up yet.
    assert killed and summary["restarts"] <= 1 and summary["resumed_step"] == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_gradient_that_is_not_finite_names_its_images(
    tmp_path: Path, shards: Shards, small: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lodeset.training.loop.clip_gradients", lambda student, largest: float("inf"))
    with pytest.raises(LodesetError, match="norm became inf on worker 0 at step 0"):
        train_inline(small, shards, tmp_path)
    assert len(json.loads((tmp_path / "nonfinite-step-0000000-worker-0.json").read_text())["image_ids"]) == 8
    assert not list(tmp_path.glob("step-*"))


def test_gradients_are_clipped_in_each_submodule(small: TrainingConfig) -> None:
    student, _ = student_and_teacher(small)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    total = sum(parameter.numel() for parameter in student.parameters()) ** 0.5
    assert clip_gradients(student, 3.0) == pytest.approx(total, rel=1e-5)
    for part in (student.backbone, student.dino_head, student.ibot_head):
        norm = torch.stack([(parameter.grad**2).sum() for parameter in part.parameters() if parameter.grad is not None])
        assert float(norm.sum().sqrt()) == pytest.approx(3.0, rel=1e-4)


def test_tied_heads_are_one(small: TrainingConfig) -> None:
    tied = small.model_copy(update={"heads": small.heads.model_copy(update={"tied": True})})
    student, teacher = student_and_teacher(tied)
    assert [name for name, _ in student.named_children()] == ["backbone", "dino_head"]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    update_teacher(student, teacher, 0.75)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.25)


@pytest.mark.parametrize("change", [{"steps": 5}, {"steps": 2}])
def test_a_run_of_other_length_says_how_to_go_on(
    tmp_path: Path, shards: Shards, small: TrainingConfig, change: dict[str, int]
) -> None:
    """Rates follow the length: what was trained for 4 steps is no beginning of 5."""
    train_inline(small.model_copy(update={"steps": 4}), shards, tmp_path)
    told = rf"training\.steps: 4 -> {change['steps']}.*cannot be extended.*`weights: \{{path: .*\}}`"
    with pytest.raises(LodesetError, match=told):
        train_inline(small.model_copy(update=change), shards, tmp_path)
    with pytest.raises(LodesetError, match=told):
        check_settings(tmp_path, identity_of(small.model_copy(update=change)))  # before any image is read
    check_settings(tmp_path, identity_of(small.model_copy(update={"steps": 4})))
    check_settings(tmp_path / "none", identity_of(small))
    with pytest.raises(LodesetError, match=r"with other settings \(training\.seed: .*training\.steps"):
        train_inline(small.model_copy(update={**change, "seed": 9}), shards, tmp_path)
