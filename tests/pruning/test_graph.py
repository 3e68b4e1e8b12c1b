"""`prune` as a stage, without an engine."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import picture, write_shards
from inline import artifact, listed, ran, target_set, without_engine

from lodeset.pipeline.config import TargetSet
from lodeset.pipeline.dag.stage import Context, Outcome, Stage
from lodeset.pipeline.dag.store import Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning import graph
from lodeset.pruning.choosing.criteria import METHODS
from lodeset.pruning.config import LotteryJob, PruneJob, SelfMaskingJob
from lodeset.pruning.formats.saving import load_model
from lodeset.pruning.jobs import run
from lodeset.pruning.learning.masks import density, digest_of, load_masks
from lodeset.pruning.learning.self_masking import load_masked
from lodeset.pruning.specs import trainings
from lodeset.training.config import TrainingConfig
from lodeset.training.export import export
from lodeset.training.specs import TrainSpec
from lodeset.training.ssl import student_and_teacher

SIDE = 40
CONFIG = TrainingConfig.model_validate(
    {
        "max_pixels": 24 * 20,  # of the images in the shards; those of the target set are larger
        "model": {"dim": 16, "depth": 1, "heads": 2},
        "crops": {"global_size": 16, "local_size": 16},
        "heads": {"prototypes": 8, "hidden": 8, "dino_bottleneck": 8, "ibot_bottleneck": 8},
    }
)


def never(context: Context) -> Outcome:
    raise AssertionError("only made by hand here")


def test_a_sweep_over_a_target_set_of_images_that_training_would_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_engine(run, monkeypatch)
    torch.manual_seed(0)
    store = Store(str(tmp_path / "store"))
    above = {
        id_: Stage(id_.split("/")[0], id_.split("/")[1], 1, "ray", never, {})
        for id_ in ("ingest/target", "train/all", "finish/all", "write_shards/all")
    }
    for id_ in ("train/all", "finish/all"):
        above[id_] = replace(above[id_], spec=TrainSpec(config=CONFIG))
    job = PruneJob(sweep=(1e-3, 1e-2), calibration_images=32)
    heads = PruneJob(checkpoint="finish", targets=("heads",), sweep=(1e-3,), calibration_images=32)
    tickets = LotteryJob(method="lottery", tasks=("labels", "rotation", "dino"), rounds=2, steps=6, batch=8)
    masks = SelfMaskingJob(method="self_masking", task="labels", steps=4, batch=8, lr=(1000.0, 50.0))
    stage = graph.build([job, heads, tickets, masks], [TargetSet(name="target", uri="target/")], above, SIDE**2)[
        "prune/all"
    ]

    _, teacher = student_and_teacher(CONFIG)
    export(teacher.backbone, Path(store.path("training/model")))
    write_shards(Path(store.path("shards")), [picture(n, width=24, height=20) for n in range(32)])
    files = {"index": (listed(store, "shards/index.parquet", 32),)}
    model = {"model": (listed(store, "training/model/model.safetensors"),)}
    inputs = {
        **{
            f"{name}/all": artifact(name, "all", Outcome(model, Rows(32, 32), details={"folder": "training/model"}))
            for name in ("train", "finish")
        },
        "write_shards/all": artifact("write_shards", "all", Outcome(files, Rows(32, 32))),
        **target_set(store, tmp_path / "target", SIDE),
    }
    pruned = ran(store, stage, inputs)
    told, of_heads, of_tickets, of_masks = pruned.details["jobs"]
    assert told["knn_dense"] == of_heads["knn_dense"]
    assert "blocks.0.attn" in told["skipped_modules"] and "blocks.0.mlp.fc1" in of_heads["skipped_modules"]
    assert [set(v["units"]) for v in of_heads["variants"]] == [{"blocks.0.attn"}] * 6
    assert told["calibration_images"] == 32
    assert [(v["eps_w"], v["method"]) for v in told["variants"]] == [(e, m) for e in job.sweep for m in METHODS]
    assert all(set(v["knn"]["target"]) == {"8"} for v in told["variants"])
    assert stage.work == pruned.details["work"] == 18 + 2

    assert len(of_tickets["variants"]) == trainings(tickets) == (3 + 2) * (1 + 2 * 2)
    methods = {"labels", "rotation", "dino"}
    methods |= {f"{task}, at random" for task in methods} | {
        f"{task}, then labels" for task in methods if not task.startswith("labels")
    }
    by_method = {name: [v for v in of_tickets["variants"] if v["method"] == name] for name in methods}
    for name, rows in by_method.items():
        kept = [round(row["kept"], 2) for row in sorted(rows, key=lambda row: row["round"])]
        assert kept == ([0.8, 0.64] if "random" in name else [1.0, 0.8, 0.64])
    assert [(o["round"], o["one"], o["other"]) for o in of_tickets["overlaps"]] == [
        (turn, *pair) for turn in (1, 2) for pair in (("labels", "rotation"), ("labels", "dino"), ("rotation", "dino"))
    ]
    made_for: dict[str, str] = {}
    for one in (*of_tickets["variants"], *of_masks["variants"]):
        assert set(one["knn"]["target"]) == {"8"} and 0 <= one["linear"]["target"] <= 1
        folder_of = Path(store.path(one["model"]))
        masks_of, made_for[one["model"]] = load_masks(folder_of / "masks.safetensors")
        weights = dict(load_model(folder_of).named_parameters())
        assert density(masks_of) == pytest.approx(one["kept"])
        assert all((weights[name][~mask] == 0).all() for name, mask in masks_of.items())
    dense = load_model(Path(store.path("training/model")))
    assert {made_for[one["model"]] for one in of_masks["variants"]} == {digest_of(dense.state_dict())}
    started = [
        {made_for[v["model"]] for v in of_tickets["variants"] if v["masks_of"] == task} for task in tickets.tasks
    ]
    assert [len(weights) for weights in started] == [1, 1, 1] and len(set.union(*started)) == 3
    path = Path(store.path(of_masks["variants"][2]["model"]))
    same = load_masked(dense, path / "masks.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), load_model(path).parameters(), strict=True))
    with pytest.raises(LodesetError, match="holds masks for the weights"):
        load_masked(load_model(path), path / "masks.safetensors")
    assert [(v["lr"], v["method"]) for v in of_masks["variants"]] == [
        (lr, how) for lr in (50.0, 1000.0) for how in ("masks, labels", "masks, at random")
    ]
    for learned, drawn in zip(of_masks["variants"][::2], of_masks["variants"][1::2], strict=True):
        assert learned["kept"] == drawn["kept"] and 30 * learned["masks_bytes"] < 1.7 * learned["weights_bytes"] + 10**5
    # The models are not larger than they were before, so what is planned for is enough.
    assert 0 < sum(file.size_bytes for file in pruned.tables["models"]) < (stage.size_bytes or 0)


def test_plans_count_the_passes_of_a_job() -> None:
    both = {"targets": ("units", "heads"), "calibration_images": 200, "sweep": (1e-3, 1e-2)}
    looks = {
        key: graph._looks(PruneJob.model_validate(both | more), 3)
        for key, more in {
            "at once": {},
            "in turn": {"mode": "sequential"},
            "a share": {"remove": [0.5]},
            "a share in turn": {"remove": [0.5], "mode": "sequential"},
        }.items()
    }
    layers, weighed = 3 * 2, 2 * 128  # two strengths, on 128 images each
    assert looks == {
        "at once": 0,
        "in turn": layers * 2 * (6 + 1) * 200,  # two models of each of six methods, and what they keep
        "a share": layers * weighed,
        "a share in turn": layers * (weighed + 6 * 200),
    }
