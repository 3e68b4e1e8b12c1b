"""What follows a run: a last stage at a higher resolution, and a smaller model that learns from the finished one."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from lodeset.pipeline.dag.stage import Context, Outcome, Stage
from lodeset.pipeline.errors import LodesetError
from lodeset.training import graph
from lodeset.training.checkpoint import newest_checkpoint, read_checkpoint
from lodeset.training.config import DistillConfig, TrainingConfig, distilling, finishing, identity_of
from lodeset.training.data import Batches
from lodeset.training.export import load_backbone
from lodeset.training.index import Shards, open_index
from lodeset.training.launch import train_inline
from lodeset.training.objectives.dinov2 import losses
from lodeset.training.origin import Origin, networks
from lodeset.training.schedules import StepValues, step_values
from lodeset.training.vit import DinoVisionTransformer

Interruption = Callable[[int], AbstractContextManager[None]]
SHARDS = {"write_shards/all": Stage("write_shards", "all", 1, "ray", lambda context: never(context), {})}


def at_temperature(config: TrainingConfig, temperature: float) -> StepValues:
    return replace(step_values(config, 0), teacher_temperature=temperature)


def never(context: Context) -> Outcome:
    raise AssertionError("only built here")


@pytest.fixture
def whole(small: TrainingConfig) -> TrainingConfig:
    tree = small.model_dump() | {
        "finish": {"global_size": 48, "steps": 3},
        "distill": {"model": {"dim": 8, "depth": 1, "heads": 1}, "steps": 4},
    }
    return TrainingConfig.model_validate(tree)


@pytest.fixture
def trained(tmp_path: Path, shards: Shards, whole: TrainingConfig) -> Origin:
    train_inline(whole, shards, tmp_path / "train")
    return Origin(path=str(tmp_path / "train" / "step-0000006"), digest="train", of=whole)


def test_derived_runs_say_what_changes_and_what_does_not(whole: TrainingConfig) -> None:
    last, smaller = finishing(whole), distilling(whole)
    assert (last.crops.global_size, last.crops.local_size, last.steps, last.batch) == (48, 16, 3, 8)
    assert last.model == whole.model and last.optimiser.base_lr == whole.optimiser.base_lr / 10
    assert smaller.model.registers == whole.model.registers == 1  # as the teacher, where nothing is said
    assert (smaller.model.dim, smaller.model.drop_path, smaller.optimiser.base_lr) == (8, 0.0, 1e-3)
    assert smaller.masking.probability == 1 and smaller.masking.ratio == (1, 1)
    assert smaller.heads == whole.heads and smaller.crops == whole.crops
    for one in (last, smaller):
        assert one.finish is None and one.distill is None and one.weights is None


def test_a_higher_resolution_goes_on_with_both_networks(
    tmp_path: Path, shards: Shards, whole: TrainingConfig, trained: Origin
) -> None:
    config = finishing(whole)
    nets = networks(config, trained)
    for network, name in ((nets.student, "student"), (nets.average, "teacher")):
        state = read_checkpoint(Path(trained.path), f"{name}.")
        for key, value in network.state_dict().items():
            if key != "backbone.pos_embed":
                assert torch.equal(value, state[key]), key
        stored = state["backbone.pos_embed"]  # 4 x 4 positions and CLS, as this model interpolates them to 6 x 6
        assert torch.equal(network.backbone.pos_embed, network.backbone.interpolated(stored, 6, 6))
        assert network.backbone.pos_embed.shape == (1, 37, 16)
    train_inline(config, shards, tmp_path / "finish", trained)
    assert load_backbone(tmp_path / "finish").image_size == 48


def test_a_smaller_model_learns_from_one_that_stays_as_it_is(
    tmp_path: Path, shards: Shards, whole: TrainingConfig, trained: Origin
) -> None:
    config = distilling(whole)
    origin = trained.model_copy(update={"distil": True})
    nets = networks(config, origin)
    before = {name: value.clone() for name, value in nets.teacher.state_dict().items()}
    assert nets.distils and nets.teacher.backbone.config.dim == 16 and nets.average.backbone.config.dim == 8

    batch = Batches(open_index(shards.index), config, 0, 1).load(0)
    assert bool(batch.masks.all())  # every patch of both global crops has a patch-level term
    seen = losses(nets, batch, at_temperature(config, 0.04), config, None)
    hidden = losses(
        replace(nets, average=nets.teacher), batch, at_temperature(config, 0.04), config, None
    )  # as if it were no distillation
    assert not torch.equal(seen.terms["ibot"], hidden.terms["ibot"])
    seen.total.backward()
    with torch.no_grad():
        nets.student.backbone.mask_token.add_(1.0)  # which no crop of this run contains
    again = losses(nets, batch, at_temperature(config, 0.04), config, None)
    assert all(torch.equal(again.terms[name], seen.terms[name]) for name in seen.terms)

    train_inline(config, shards, tmp_path / "distill", origin)
    assert all(torch.equal(value, before[name]) for name, value in nets.teacher.state_dict().items())
    exported = load_backbone(tmp_path / "distill")
    assert exported.config.dim == 8 and exported.config.depth == 1
    found = newest_checkpoint(
        tmp_path / "distill",
        {
            "training": identity_of(config),
            "images": open_index(shards.index).digest(),
            "origin": "train",
        },
    )
    assert found is not None and found[0] == 4
    average = read_checkpoint(found[1], "teacher.backbone.")
    assert torch.equal(average["norm.weight"], exported.norm.weight)


def test_released_weights_are_distilled_on_their_own_grid(
    tmp_path: Path, shards: Shards, small: TrainingConfig
) -> None:
    """Weights for 40 pixels, trained on at 32, then taught: the teacher keeps the positions that were stored for 40."""
    model = small.model.model_copy(update={"dim": 64, "heads": 1})
    smaller = DistillConfig(model=small.model.model_copy(update={"drop_path": 0.0}), steps=3)
    config = small.model_copy(update={"model": model, "distill": smaller})
    torch.save(DinoVisionTransformer(model, 40).state_dict(), tmp_path / "released.pth")
    train_inline(config, shards, tmp_path / "train", Origin(path=str(tmp_path / "released.pth"), digest="released"))
    state = tmp_path / "train" / "step-0000006"
    origin = Origin(path=str(state), digest="train", of=config, distil=True)
    assert networks(distilling(config), origin).teacher.backbone.image_size == 40
    train_inline(distilling(config), shards, tmp_path / "distill", origin)
    assert load_backbone(tmp_path / "distill").config.dim == 16
    shutil.rmtree(state)
    with pytest.raises(LodesetError, match="which this run starts from, no longer exists"):
        networks(distilling(config), origin)


@pytest.mark.parametrize("distils", [False, True])
def test_what_starts_from_another_run_resumes_exactly(
    tmp_path: Path, shards: Shards, small: TrainingConfig, distils: bool, interrupted: Interruption
) -> None:
    """With moving means as centres and tied heads: both are state that a checkpoint must hold."""
    tree = small.model_dump() | {
        "losses": {"centering": "softmax"},
        "heads": small.heads.model_dump() | {"tied": True},
        "finish": {"global_size": 48, "steps": 6},
        "distill": {"model": {"dim": 8, "depth": 1, "heads": 1}, "steps": 6},
    }
    whole = TrainingConfig.model_validate(tree)
    train_inline(whole, shards, tmp_path / "train")
    origin = Origin(path=str(tmp_path / "train" / "step-0000006"), digest="train", of=whole, distil=distils)
    config = distilling(whole) if distils else finishing(whole)
    trained = read_checkpoint(Path(origin.path), "centers.")
    assert trained["cls"].any() and trained["patch"].any()
    assert torch.equal(networks(config, origin).buffers.get_buffer("centers.cls"), trained["cls"])

    train_inline(config, shards, tmp_path / "unbroken", origin)
    with interrupted(5):
        train_inline(config, shards, tmp_path / "broken", origin)
    assert train_inline(config, shards, tmp_path / "broken", origin)["resumed_step"] == 3
    unbroken, broken = (read_checkpoint(tmp_path / name / "step-0000006", "") for name in ("unbroken", "broken"))
    assert unbroken.keys() == broken.keys()
    assert all(torch.equal(value, broken[name]) for name, value in unbroken.items())
    assert not torch.equal(unbroken["centers.cls"], trained["cls"])


def test_each_stage_reads_the_one_before(whole: TrainingConfig) -> None:
    stages = graph.build(whole, [], SHARDS, 100)
    assert list(stages) == ["train/all", "finish/all", "distill/all"]
    assert stages["finish/all"].inputs["before"].stage is stages["train/all"]
    assert stages["distill/all"].inputs["before"].stage is stages["finish/all"]
    alone = graph.build(whole.model_copy(update={"finish": None, "distill": None}), [], SHARDS, 100)
    assert alone["train/all"].config == stages["train/all"].config  # what follows does not change what it is


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"finish": {"global_size": 50}}, "finish: .*global_size 50 is not a multiple of patch_size 8: use 48"),
        ({"distill": {"steps": 5, "model": {"patch_size": 4}}}, "patches of 4 pixels cannot learn from patches of 8"),
        ({"distill": {"steps": 5, "batch": 3, "model": {}}, "workers": 2}, "distill: .*cannot share a batch of 3"),
        ({"distill": {"steps": 5, "model": {"drop_path": 0.1}}}, "distillation does not use drop_path"),
    ],
)
def test_stages_that_cannot_be_are_refused(small: TrainingConfig, changed: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        TrainingConfig.model_validate(small.model_dump() | changed)
