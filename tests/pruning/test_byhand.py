"""One job alone, in one process: what is reported is what lies on disk, whatever was there before."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import picture, write_shards
from inline import alone_in_this_process
from networks import LeNet, Residual, images, shaken
from torch import nn

from lodeset.infra.models import dense_of, prune_on
from lodeset.pipeline.config import TargetSet
from lodeset.pipeline.dag.stored import Stored
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.config import Job, LotteryJob, PruneJob, RecoverConfig, SelfMaskingJob
from lodeset.pruning.formats.saving import load_model, save_pruned
from lodeset.pruning.jobs import run, trained
from lodeset.pruning.jobs.distil import towards
from lodeset.pruning.jobs.judging import batched
from lodeset.pruning.jobs.setting import Setting
from lodeset.pruning.jobs.sweep_parts import calibration
from lodeset.pruning.learning.examples import Examples
from lodeset.pruning.learning.loop import NotLearnedError, Recipe
from lodeset.pruning.learning.masks import Masks
from lodeset.pruning.learning.self_masking import learn_masks
from lodeset.pruning.learning.tasks import Task
from lodeset.pruning.specs import images_per_part, trainings
from lodeset.training.config import CropsConfig
from lodeset.training.index import Shards, open_index

JOB = PruneJob(sweep=(1e-2,), calibration_images=40)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    alone_in_this_process(monkeypatch, run)
    torch.manual_seed(0)
    write_shards(tmp_path / "shards", [picture(n, width=24, height=20) for n in range(60)])
    save_pruned(shaken(LeNet()), tmp_path / "lenet", images(2))
    return tmp_path


def prune(
    folder: Path, job: Job, model: str = "lenet", size: int | None = 16, target: TargetSet | None = None
) -> dict[str, Any]:
    shards = Shards(index=(str(folder / "shards/index.parquet"),))
    return prune_on(*dense_of(folder / model, size), shards, folder / "out", job, target, cpus=1)


def pruned(folder: Path, job: PruneJob = JOB, model: str = "lenet", size: int | None = 16) -> dict[str, Any]:
    told = prune(folder, job, model, size)
    for one in told["variants"]:
        small = load_model(folder / "out" / one["model"])
        assert sum(p.numel() for p in small.parameters()) == one["parameters"]
    return told


def test_another_job_into_the_same_folder(folder: Path) -> None:
    first, again = pruned(folder), pruned(folder)
    assert again["variants"] == first["variants"]
    other = pruned(folder, JOB.model_copy(update={"sweep": (1e-2,), "l2_ratio": 0.01}))
    assert other["variants"][0]["parameters"] != first["variants"][0]["parameters"]
    description = folder / "lenet/graph.json"
    description.write_text(description.read_text().replace("torch.relu", "torch.tanh"))
    changed = pruned(folder)
    assert changed["variants"] != first["variants"]
    shutil.rmtree(folder / "out/models")
    assert len(pruned(folder)["variants"]) == len(changed["variants"])  # what is gone is made again


def test_groups_in_turn(folder: Path) -> None:
    told = pruned(folder, JOB.model_copy(update={"mode": "sequential", "sweep": (1e-2, 1e-3)}))
    assert [one["eps_w"] for one in told["variants"]] == [1e-3] * 6 + [1e-2] * 6
    at_once = pruned(folder)
    by_method = [{one["method"]: one for one in report["variants"][-6:]} for report in (told, at_once)]
    units = [one["random+refit"]["units"] for one in by_method]
    assert units[0]["conv1"] == units[1]["conv1"]
    assert by_method[0]["entropic+refit"]["unexplained"]["fc2"] != by_method[1]["entropic+refit"]["unexplained"]["fc2"]


@pytest.mark.parametrize("mode", ["one_pass", "sequential"])
def test_shares_of_the_parameters_to_remove(folder: Path, mode: str) -> None:
    job = PruneJob.model_validate({"remove": [0.7, 0.4], "calibration_images": 40, "mode": mode})
    told = pruned(folder, job)
    assert [one["remove"] for one in told["variants"]] == [0.4] * 6 + [0.7] * 6
    for one in told["variants"]:
        assert one["remove"] <= one["parameters_removed"] < one["remove"] + 0.15
        assert set(one["strengths"]) == set(one["units"]) == {"conv1", "conv2", "fc1"}
        assert set(one["strengths"].values()) <= {0.0, *job.sweep}
        full = {"conv1": 6, "conv2": 8, "fc1": 12}
        assert all(one["units"][name] == full[name] for name, eps in one["strengths"].items() if eps == 0.0)
        assert one["dense"]["channels"] == sum(full.values())
        assert one["units"] == told["variants"][0 if one["remove"] == 0.4 else 6]["units"]
    assert len({tuple(sorted(one["strengths"].items())) for one in told["variants"]}) == 2

    def solved() -> set[Path]:
        return set((folder / "out/parts/prune_solved").iterdir())

    before = solved()
    assert [one["remove"] for one in pruned(folder, job.model_copy(update={"remove": (0.5,)}))["variants"]] == [0.5] * 6
    assert solved() == before and len(before) == 3
    other = pruned(folder, job.model_copy(update={"mode": "one_pass" if mode == "sequential" else "sequential"}))
    assert solved() == before  # units are chosen in one pass either way, layers rewritten in another
    for one, in_turn in zip(told["variants"], other["variants"], strict=True):
        assert one["units"] == in_turn["units"]
        if one["method"].endswith("+refit"):
            assert one["unexplained"] != in_turn["unexplained"]
    with pytest.raises(LodesetError, match=r"remove 0\.99: at the strongest penalty of sweep, 0\.1638"):
        pruned(folder, job.model_copy(update={"remove": (0.99,)}))


def test_a_model_alone_learns_what_the_dense_one_gives(folder: Path) -> None:
    """Of any kind, without labels, and from the weights that refit left."""
    as_judged = {"global_scale": [0.9, 1.0], "jitter": 0, "grey": 0, "blur": [0, 0, 0], "solarise": 0}
    recover = {"steps": 60, "base_lr": 2e-3, "crops": as_judged}
    job = PruneJob.model_validate(
        {"remove": [0.4, 0.6], "calibration_images": 40, "recover": recover | {"sweep": [0.6]}}
    )
    told = pruned(folder, job)
    by_method = {one["method"]: one for one in told["variants"] if one["remove"] == 0.6}
    assert len(told["variants"]) == 6 + 6 + 3 and len(by_method) == 6 + 3
    for method in ("entropic+refit", "magnitude+refit", "random+refit"):
        before, after = by_method[method], by_method[f"{method}, distilled by outputs"]
        assert (after["parameters"], after["units"]) == (before["parameters"], before["units"])
        assert after["steps"] == 60 and 0 < after["losses"]["outputs"] < 0.01
        assert after["images_seen"] == 60 * 40  # the other 20 are compared on
        left, learned = (load_model(folder / "out" / one["model"]).state_dict() for one in (before, after))
        assert {n: t.shape for n, t in left.items()} == {n: t.shape for n, t in learned.items()}
        assert any(not torch.equal(left[n], learned[n]) for n in left)
    assert pruned(folder, job)["variants"] == told["variants"]


def test_a_distillation_leaves_norms_and_dropout_alone() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 5)
    )
    shaken(dense)
    student = copy.deepcopy(dense)
    with torch.no_grad():
        student[5].weight.mul_(0.5)

    class Noise:
        def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            return images(16, seed=step).view(2, 8, 3, 16, 16), torch.full((8,), -1)

    before = [seen.clone() for seen in student.buffers()]
    first = towards(dense, copy.deepcopy(student), Noise(), Recipe(1, 1e-3, 0.0, 0.0, 0))
    last = towards(dense, student, Noise(), Recipe(100, 1e-2, 0.0, 0.1, 0))
    assert last < 0.1 * first  # dropout would leave half of the outputs' variance
    assert all(torch.equal(one, other) for one, other in zip(before, student.buffers(), strict=True))
    assert not student.training and not any(module.training for module in student.modules())


def test_a_distillation_that_diverges_says_what_to_lower(folder: Path) -> None:
    job = JOB.model_copy(update={"recover": RecoverConfig(steps=20, base_lr=1e30)})
    with pytest.raises(
        LodesetError, match=r"pruned by entropic\+refit could not be distilled .* lower recover.base_lr \(1e\+30\)"
    ):
        pruned(folder, job)


def test_calibration_images_are_split_into_few_parts_that_fit_in_memory() -> None:
    sizes = {images: images_per_part(images) for images in (1, 64, 512, 1_024, 10_000, 100_000)}
    assert all(64 <= size <= 1_024 for size in sizes.values())
    assert all(-(-images // size) <= 16 for images, size in sizes.items() if images <= 16_384)


def test_agreement_is_the_mean_cosine_on_images_that_were_not_calibrated_on(folder: Path) -> None:
    told = pruned(folder)
    setting = Setting(
        None,
        Stored(folder=str(folder / "lenet")),
        (str(folder / "shards/index.parquet"),),
        16,
        10**6,
        10**6,
        (),
        "",
        CropsConfig(),
    )  # type: ignore[arg-type]
    _, rest = calibration(setting.index, JOB)
    assert len(rest) == 20
    (batch,) = batched(setting.pixels(open_index(setting.index), rest))
    for one in told["variants"]:
        small = load_model(folder / "out" / one["model"])
        with torch.no_grad():
            a, b = (model(batch).double().numpy() for model in (small, setting.model()))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert one["agreement"] == pytest.approx(cosine.mean(), abs=2e-5)
    assert pruned(folder, JOB.model_copy(update={"calibration_images": 60}))["variants"][0]["agreement"] is None


def test_a_layer_that_cannot_be_solved_is_left_whole(folder: Path) -> None:
    """As residual networks begin: the last convolution of a branch gives nothing."""
    model = Residual()
    layer = model.get_submodule("first.3")
    assert isinstance(layer, nn.Conv2d)
    nn.init.zeros_(layer.weight)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1)
    save_pruned(model.eval(), folder / "residual", images(2))
    told = pruned(folder, model="residual")
    assert "first.3: " in told["skipped_modules"]["first.0"]
    assert {tuple(one["units"]) for one in told["variants"]} == {("stem.0 + first.3", "second.0", "short.0 + second.3")}
    told = pruned(folder, PruneJob(remove=(0.2,), sweep=(1e-2, 1e-1), calibration_images=40), "residual")
    assert "first.3: " in told["skipped_modules"]["first.0"]
    assert all("first.0" not in one["units"] and one["parameters_removed"] >= 0.2 for one in told["variants"])
    one_image = prune_error(folder, PruneJob(remove=(0.2,), calibration_images=1))
    assert "do not vary over the 1 calibration images" in one_image and "raise calibration_images" in one_image
    nothing = prune_error(folder, JOB.model_copy(update={"calibration_images": 2}))
    assert "nothing can be pruned: " in nothing and "cannot determine" in nothing


def prune_error(folder: Path, job: PruneJob, size: int = 16) -> str:
    with pytest.raises(LodesetError) as told:
        pruned(folder, job, size=size)
    return str(told.value)


def test_images_of_another_size(folder: Path) -> None:
    assert "does not take images of 3 x 8 x 8 values" in prune_error(folder, JOB, size=8)
    assert json.loads((folder / "lenet/graph.json").read_text())


@pytest.mark.filterwarnings("ignore::ImportWarning")  # Beam, when it is first imported
def test_tickets_of_units_on_images_alone_and_on_labels(folder: Path) -> None:
    """Of a network of somebody else's; half of the rounds are made already when it is asked for all."""
    rows = [{"image": picture(n), "label": "ab"[n % 2], "split": ("gallery", "test")[n % 3 == 0]} for n in range(24)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "labelled.parquet")
    target = TargetSet(name="target", uri=str(folder / "labelled.parquet"))
    job = LotteryJob(
        method="lottery", tasks=("rotation", "labels"), rounds=1, rate=0.4, structured=True, steps=5, batch=8
    )
    save_pruned(shaken(Residual()), folder / "residual", images(2))
    first = prune(folder, job, "residual", target=target)
    told = prune(folder, job.model_copy(update={"rounds": 2}), "residual", target=target)
    of = {(v["method"], v["round"]): v for v in told["variants"]}
    assert all(of[v["method"], v["round"]] == v for v in first["variants"]) and len(of) == trainings(job) + 6
    for one in told["variants"]:
        small = load_model(folder / "out" / one["model"])
        assert sum(p.numel() for p in small.parameters()) == one["parameters"]
        assert one["parameters_removed"] > 0.4 * one["round"] ** 0.5 or not one["round"]
        assert set(one["knn"]) == set(one["linear"]) == {"target"}
        assert one["left_whole"] == told["skipped_modules"] and "head" in told["skipped_modules"]


def test_rates_that_learn_nothing_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def learned(
        network: nn.Module, task: Task, examples: Examples, recipe: Recipe, head_lr: float
    ) -> tuple[Masks, float]:
        if recipe.lr > 1:
            raise NotLearnedError(f"lower lr ({recipe.lr:g})")
        return learn_masks(network, task, examples, recipe, head_lr)

    monkeypatch.setattr(trained, "learn_masks", learned)
    job = SelfMaskingJob(method="self_masking", steps=3, batch=8, lr=(0.1, 5), prototypes=4, queue=8)
    told = prune(folder, job, "lenet")
    assert {one["lr"] for one in told["variants"]} == {0.1}
    assert list(told["skipped_modules"]) == ["lr 5"]
    with pytest.raises(LodesetError, match="no masks were learned: "):
        prune(folder, job.model_copy(update={"lr": (5.0,)}), "lenet")
    labels = LotteryJob(method="lottery", tasks=("labels",), steps=3, batch=8)
    with pytest.raises(LodesetError, match="takes one as --target"):
        prune(folder, labels, "lenet")
