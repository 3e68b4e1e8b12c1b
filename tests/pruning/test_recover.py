"""What pruning left, trained again: from the right networks, towards the dense model, once."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import picture, write_shards
from inline import alone_in_this_process, artifact, listed, ran, target_set, without_engine

from lodeset.infra.models import dense_of, prune_on
from lodeset.pipeline.config import TargetSet
from lodeset.pipeline.dag.stage import Context, Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, File, Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning import graph
from lodeset.pruning.choosing.criteria import METHODS
from lodeset.pruning.config import PruneJob, RecoverConfig, run_of
from lodeset.pruning.formats.saving import load_model
from lodeset.pruning.jobs import recover
from lodeset.pruning.jobs import run as prune_stage
from lodeset.training.checkpoint import MARKER, read_checkpoint
from lodeset.training.config import TrainingConfig, distilling, finishing
from lodeset.training.export import export
from lodeset.training.index import Shards
from lodeset.training.launch import train_inline
from lodeset.training.narrow import load_narrow, narrow, save_narrow
from lodeset.training.origin import Origin, finished, networks
from lodeset.training.specs import TrainSpec
from lodeset.training.vit import DinoVisionTransformer

CONFIG = TrainingConfig.model_validate(
    {
        "steps": 2,
        "batch": 8,
        "model": {"dim": 16, "depth": 1, "heads": 2, "patch_size": 8, "drop_path": 0.5},
        "crops": {"global_size": 16, "local_size": 8, "local_count": 1},
        "heads": {"prototypes": 8, "hidden": 8, "dino_bottleneck": 8, "ibot_bottleneck": 8},
    }
)
EPS = 1e-2


def never(context: Context) -> Outcome:
    raise AssertionError("only made by hand here")


class World:
    """A trained run in a store, and pruning jobs on it without an engine."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        without_engine(prune_stage, patch)
        self.runs: list[tuple[Path, Origin]] = []
        self.summaries: list[dict[str, Any]] = []
        self.lost = 0  # how many runs are still to be stopped at their first step
        patch.setattr(recover, "ray_job", lambda _: nullcontext())
        patch.setattr(recover, "launch", self.launch)
        self.store = Store(str(folder / "store"))
        index = write_shards(Path(self.store.path("shards")), [picture(n, width=24, height=20) for n in range(40)])
        self.shards = Shards(index=(str(index),))
        train_inline(CONFIG, self.shards, Path(self.store.path("training/run")))
        checkpoint = File(f"training/run/step-0000002/{MARKER}", 0, 1, "of-this-run")
        files = {"index": (listed(self.store, "shards/index.parquet", 40),)}
        made = {"checkpoints": (checkpoint,), "model": (listed(self.store, "training/run/model.safetensors"),)}
        details = {"folder": "training/run"}
        self.inputs: dict[str, Artifact] = {
            "train/all": artifact("train", "all", Outcome(made, Rows(40, 40), details=details)),
            "write_shards/all": artifact("write_shards", "all", Outcome(files, Rows(40, 40))),
            **target_set(self.store, folder / "target", 24),
        }

    def launch(self, config: TrainingConfig, shards: Shards, folder: Path, cpus: int, origin: Origin) -> dict[str, Any]:
        self.runs.append((folder, origin))
        if self.lost:
            self.lost -= 1
            train_inline(config.model_copy(update={"checkpoint_every": 1}), shards, folder, origin)
            for left in (*folder.glob("step-*2"), folder / "summary.json"):
                left.rename(left.with_name(f"gone-{left.name}"))
            raise LodesetError("the machine went away")
        self.summaries.append(train_inline(config, shards, folder, origin))
        return self.summaries[-1]

    def prune(self, job: PruneJob, targets: tuple[str, ...] = ("target",)) -> Artifact:
        above = {
            id_: Stage(id_.split("/")[0], id_.split("/")[1], 1, "ray", never, {})
            for id_ in ("ingest/target", "train/all", "write_shards/all")
        }
        above["train/all"] = replace(above["train/all"], spec=TrainSpec(config=CONFIG))
        stage = graph.build([job], [TargetSet(name=name, uri=f"{name}/") for name in targets], above, 24**2)[
            "prune/all"
        ]
        return ran(self.store, stage, self.inputs)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    torch.manual_seed(0)
    return World(tmp_path, monkeypatch)


def job(how: str, **more: Any) -> PruneJob:
    settings = {"how": how, "steps": 2, "base_lr": 0.1, **more}
    return PruneJob(sweep=(EPS, 1e-3), calibration_images=32, recover=RecoverConfig.model_validate(settings))


@pytest.mark.parametrize(("how", "told"), [("distill", "distilled"), ("finetune", "fine-tuned")])
def test_each_refitted_model_is_trained_once(world: World, how: str, told: str) -> None:
    before = len(list(Path(world.store.path("training")).iterdir()))
    (found,) = world.prune(job(how, sweep=[EPS])).details["jobs"]
    methods = [v["method"] for v in found["variants"] if v["eps_w"] == EPS]
    again = [f"{criterion}+refit, {told}" for criterion in ("entropic", "magnitude", "random")]
    assert methods == [*METHODS, *again]
    assert [v["method"] for v in found["variants"] if v["eps_w"] != EPS] == list(METHODS)
    by_method = {v["method"]: v for v in found["variants"] if v["eps_w"] == EPS}
    for name in again:
        one, from_ = by_method[name], by_method[name.partition(",")[0]]
        left, right = (load_model(Path(world.store.path(v["model"]))).state_dict() for v in (one, from_))
        assert {n: t.shape for n, t in left.items()} == {n: t.shape for n, t in right.items()}
        assert any(not torch.equal(left[n], right[n]) for n in left)
        assert one["parameters"] == from_["parameters"] and one["steps"] == 2 and one["images_seen"] == 16
        assert set(one["knn"]["target"]) == {"8"} and one["seconds"] > from_["seconds"]
        assert one["density"] == pytest.approx(one["nonzero"] / one["dense"]["parameters"])
    assert len(list(Path(world.store.path("training")).iterdir())) == before  # no checkpoint stays
    assert len(world.runs) == 3

    again_told = world.prune(job(how, sweep=[EPS]))
    assert again_told.details["jobs"][0]["variants"] == found["variants"] and len(world.runs) == 3
    assert again_told.details["parts_made"] == 0
    listed = {file.path for file in again_told.tables["models"]}
    assert all(any(path.startswith(v["model"]) for path in listed) for v in found["variants"])


def test_models_of_a_share_are_trained_again_and_stay_apart_in_size(world: World) -> None:
    """Groups of a share have strengths, and so widths, of their own, also where layers are refitted in turn."""
    again = RecoverConfig(steps=2)
    asked = PruneJob(remove=(0.2,), mode="sequential", targets=("units", "heads"), calibration_images=32, recover=again)
    (found,) = world.prune(asked).details["jobs"]
    trained = [v for v in found["variants"] if v["method"].endswith(", distilled")]
    assert len(trained) == 3 and len(found["variants"]) == len(METHODS) + 3
    for v in trained:
        assert v["parameters_removed"] >= 0.2 and v["strengths"] == trained[0]["strengths"]
        assert sum(p.numel() for p in load_model(Path(world.store.path(v["model"]))).parameters()) == v["parameters"]


def test_the_teacher_is_the_dense_model_and_the_student_what_was_left(world: World) -> None:
    world.prune(job("distill", sweep=[EPS]))
    (_, origin), *_ = world.runs
    assert origin.pruned is not None and origin.of is not None
    nets = networks(run_of(CONFIG, RecoverConfig(steps=2)), origin)
    dense = read_checkpoint(Path(origin.path), "teacher.")
    assert all(torch.equal(t, dense[n]) for n, t in nets.teacher.state_dict().items())
    left = load_narrow(Path(origin.pruned))
    for network in (nets.student, nets.average):
        assert all(torch.equal(t, left.state_dict()[n]) for n, t in network.backbone.state_dict().items())
        assert all(torch.equal(t, dense[f"dino_head.{n}"]) for n, t in network.dino_head.state_dict().items())
    assert all(p.requires_grad for p in nets.student.parameters())
    assert not any(p.requires_grad for net in (nets.average, nets.teacher) for p in net.parameters())
    assert {block.drop_path for block in nets.student.backbone.blocks} == {0.0}  # type: ignore[union-attr]

    goes_on = networks(CONFIG, origin.model_copy(update={"distil": False}))
    assert goes_on.teacher is goes_on.average and not goes_on.distils
    assert {block.drop_path for block in goes_on.student.backbone.blocks} == {0.5}  # type: ignore[union-attr]


def test_the_student_learns_what_the_dense_model_says(world: World) -> None:
    (found,) = world.prune(job("distill", sweep=[EPS], steps=40, base_lr=0.01)).details["jobs"]
    trained = [v for v in found["variants"] if v["method"].endswith("distilled")]
    for one in trained:
        lines = Path(world.store.path(f"{one['model']}/metrics.jsonl")).read_text().splitlines()
        first, last = (json.loads(line) for line in (lines[0], lines[-1]))
        assert last["dino"] + last["ibot"] < 0.8 * (first["dino"] + first["ibot"])
        assert one["losses"]["dino"] == last["dino"]


def test_a_recovery_that_was_stopped_goes_on(world: World) -> None:
    world.lost = 1
    with pytest.raises(LodesetError, match="went away"):
        world.prune(job("distill", sweep=[EPS]))
    folder, _ = world.runs[-1]
    assert (folder / "step-0000001").is_dir()
    world.prune(job("distill", sweep=[EPS]))
    assert [run[0] for run in world.runs].count(folder) == 2 and len(world.runs) == 4
    assert [one["resumed_step"] for one in world.summaries] == [1, 0, 0] and not folder.exists()
    folder.mkdir()  # as if it had been stopped after the part was there, and before this went
    world.prune(job("distill", sweep=[EPS]))
    assert not folder.exists() and len(world.runs) == 4


def test_on_what_models_are_judged_does_not_train_them_again(world: World) -> None:
    (first,) = world.prune(job("distill", sweep=[EPS])).details["jobs"]
    (again,) = world.prune(job("distill", sweep=[EPS]), targets=()).details["jobs"]
    assert len(world.runs) == 3 and len(again["variants"]) == len(first["variants"]) == 15
    assert all(v["knn"] == {} for v in again["variants"])


def test_a_strength_that_removes_nothing(world: World) -> None:
    (found,) = world.prune(job("distill", sweep=[EPS]).model_copy(update={"round_to": 512})).details["jobs"]
    distilled = [v for v in found["variants"] if v["method"].endswith("distilled")]
    assert len(distilled) == 3 and {v["parameters_removed"] for v in distilled} == {0.0}
    assert len(world.runs) == len({v["model"] for v in distilled})  # the same weights are not trained twice


def test_what_a_run_cannot_go_on_with() -> None:
    smaller = {"model": {"dim": 8, "depth": 1, "heads": 1}, "steps": 2}
    with_both = TrainingConfig.model_validate(
        CONFIG.model_dump() | {"distill": smaller, "finish": {"global_size": 32, "steps": 2}}
    )
    for how in ("distill", "finetune"):
        run = run_of(finishing(with_both), RecoverConfig.model_validate({"how": how, "steps": 2}))
        assert run.crops.global_size == 32 and run.finish is None and run.distill is None
    assert run_of(distilling(with_both), RecoverConfig(steps=2)).model.dim == 8
    with pytest.raises(ValueError, match="crops are those of the dense model's run"):
        run_of(CONFIG, RecoverConfig(steps=2, crops=CONFIG.crops))
    with pytest.raises(ValueError, match="use `how: distill`"):
        run_of(distilling(with_both), RecoverConfig(how="finetune", steps=2))


def test_positions_stay_on_the_grid_that_they_are_stored_for(world: World, tmp_path: Path) -> None:
    """As those of released weights, which are larger than the crops'."""
    model = DinoVisionTransformer(CONFIG.model, 32)
    save_narrow(model, tmp_path / "left")
    run = Path(world.store.path("training/run/step-0000002"))
    origin = Origin(path=str(run), digest="run", of=CONFIG, distil=True, pruned=str(tmp_path / "left"))
    config = run_of(CONFIG, RecoverConfig(steps=1))
    assert networks(config, origin).student.backbone.image_size == 32
    train_inline(config, world.shards, tmp_path / "again", origin)
    assert load_narrow(tmp_path / "again").image_size == 32


def test_a_damaged_model_is_told(world: World) -> None:
    world.prune(job("distill", sweep=[EPS]))
    (_, origin), *_ = world.runs
    assert origin.pruned is not None
    (Path(origin.pruned) / "architecture.json").write_text("{}")
    with pytest.raises(LodesetError, match="does not hold a pruned transformer"):
        networks(run_of(CONFIG, RecoverConfig(steps=2)), origin)


def test_narrow_transformers_are_never_wider(tmp_path: Path) -> None:
    model = DinoVisionTransformer(CONFIG.model, 16)
    export(model, tmp_path)
    with pytest.raises(ValueError, match="wider than"):
        narrow(model, {}, {"blocks.0.mlp.fc1.weight": torch.zeros(65, 16)})
    with pytest.raises(ValueError, match="3 attention heads"):
        narrow(model, {"blocks.0.attn": 3}, {})


def alone(world: World, model: Path, out: Path, asked: PruneJob) -> dict[str, Any]:
    return prune_on(*dense_of(model, None), world.shards, out, asked, None, cpus=1)


def test_alone_on_the_folder_of_a_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone_in_this_process(monkeypatch)
    run, out = Path(world.store.path("training/run")), tmp_path / "out"
    told = alone(world, run, out, job("distill", sweep=[EPS]))
    assert len(told["variants"]) == 12 + 3 and len(world.runs) == 3
    assert load_narrow(out / told["variants"][-1]["model"]).image_size == 16
    assert not list((out / "training").iterdir())

    of = finished(run)
    assert of is not None and of.of == CONFIG and of.path == world.runs[0][1].path
    shutil.rmtree(run / "step-0000002")
    assert finished(run) is None
    with pytest.raises(LodesetError, match="give the folder of a run"):
        alone(world, run, tmp_path / "other", job("finetune"))
    without = alone(world, run, tmp_path / "other", job("distill", sweep=[EPS]))
    assert [set(v["losses"]) for v in without["variants"] if "how" in v] == [{"outputs"}] * 3 and len(world.runs) == 3
