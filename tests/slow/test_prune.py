"""`lodeset prune` as a user types it, on a transformer and on a network of another hand."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import picture, write_tar
from commands import lodeset
from networks import LeNet, images, shaken, vit
from runs import Run, part_manifests

from lodeset.pruning.choosing.criteria import METHODS
from lodeset.pruning.formats.saving import load_model, save_pruned
from lodeset.pruning.units.groups import max_difference
from lodeset.training.export import export

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tar(tmp_path / "images-0.tar", [(f"{n}.png", picture(n, width=24, height=20)) for n in range(80)])
    export(vit(heads=4), tmp_path / "vit")
    save_pruned(shaken(LeNet()), tmp_path / "lenet", images(2))
    (tmp_path / "job.yaml").write_text("sweep: [1.0e-2]\ncalibration_images: 60\n")
    return tmp_path


Command = Callable[..., tuple[str, str]]


@pytest.fixture
def prune(ray_address: str) -> Command:
    """Standard output and standard error of `lodeset prune`, which joins the cluster that is there."""
    return functools.partial(lodeset, "prune", "--ray-address", ray_address)


def test_models_get_smaller(folder: Path, prune: Command) -> None:
    shards, config = folder / "images-{0..0}.tar", ("--config", folder / "job.yaml", "--cpus", "2", "--json")
    told = json.loads(prune(folder / "vit", folder / "out", shards, *config, "--set", "targets=[units,heads]")[0])
    assert [one["method"] for one in told["variants"]] == list(METHODS)
    assert told == json.loads((folder / "out/report.json").read_text())
    assert told["calibration_images"] == 60 and any("patch_embed" in name for name in told["skipped_modules"])
    by_method = {one["method"]: one for one in told["variants"]}
    assert by_method["entropic+refit"]["agreement"] > by_method["random"]["agreement"]
    for one in told["variants"]:
        model = load_model(folder / "out" / one["model"])
        assert sum(p.numel() for p in model.parameters()) == one["parameters"] < one["dense"]["parameters"]

    # A job that is asked for again makes nothing again; a pruned model can be pruned.
    again = json.loads(prune(folder / "vit", folder / "out", shards, *config, "--set", "targets=[units,heads]")[0])
    assert again["variants"] == told["variants"]
    smaller = folder / "out" / by_method["entropic+refit"]["model"]
    prune(smaller, folder / "twice", shards, *config)


def test_workers_do_not_matter(folder: Path, prune: Command) -> None:
    """Moments are sums of two parts, added in their order whoever made them."""
    (folder / "job.yaml").write_text("sweep: [1.0e-3, 1.0e-2]\ncalibration_images: 70\n")
    made = []
    for cpus in ("1", "2"):
        command = (
            folder / "vit",
            folder / cpus,
            folder / "images-0.tar",
            "--config",
            folder / "job.yaml",
            "--json",
        )
        told = json.loads(prune(*command, "--cpus", cpus)[0])
        made.append([load_model(folder / cpus / one["model"]).state_dict() for one in told["variants"]])
    for one, other in zip(*made, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-9)


def test_a_network_of_another_hand(folder: Path, prune: Command) -> None:
    shards, config = folder / "images-0.tar", ("--config", folder / "job.yaml", "--cpus", "2")
    told = json.loads(prune(folder / "lenet", folder / "out", shards, *config, "--size", "16", "--json")[0])
    assert set(told["variants"][0]["units"]) == {"conv1", "conv2", "fc1"}
    kept = load_model(folder / "out" / told["variants"][0]["model"])
    with torch.no_grad():
        assert kept(images(3)).shape == (3, 5)
    assert max_difference(kept, load_model(folder / "lenet"), images(3)) > 0
    assert "agreement" in prune(folder / "lenet", folder / "out", shards, *config, "--size", "16")[0]


def test_tickets_judged_on_labelled_images(folder: Path, prune: Command) -> None:
    rows = [{"image": picture(n), "label": "ab"[n % 2], "split": ("gallery", "test")[n % 3 == 0]} for n in range(24)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "labelled.parquet")
    (folder / "job.yaml").write_text("method: lottery\ntasks: [rotation, labels]\nrounds: 1\nsteps: 5\nbatch: 8\n")
    command = (folder / "lenet", folder / "out", folder / "images-0.tar", "--config", folder / "job.yaml")
    told = prune(*command, "--cpus", "2", "--size", "16", "--target", folder / "labelled.parquet")[0]
    assert "kNN, k=10" in told and "masks of rotation and labels overlap by" in told
    report = json.loads((folder / "out/report.json").read_text())
    assert [one["kept"] for one in report["variants"] if one["round"]] == pytest.approx([0.8] * 6, abs=0.01)
    page = (folder / "out/report.html").read_text()
    assert "rotation, then labels" in page and "by chance" in page
    assert "existing: none" in prune(*command, "--size", "16", code=1)[1]


def test_a_pruned_model_is_trained_again(folder: Path, prune: Command, ray_address: str) -> None:
    shards, run, out = folder / "images-{0..0}.tar", folder / "run/train", folder / "out"
    tiny = "steps=2", "batch=8", "model={dim: 16, depth: 1, heads: 2}", "crops={global_size: 32, local_size: 16}"
    join = ("--ray-address", ray_address)
    lodeset("train", folder / "run", shards, *join, "--cpus", "2", *(part for one in tiny for part in ("--set", one)))
    again = ("--config", folder / "job.yaml", "--cpus", "2", "--set", "recover={steps: 2}")
    told = json.loads(prune(run, out, shards, *again, "--json")[0])
    distilled = [one for one in told["variants"] if one["method"].endswith(", distilled")]
    assert len(distilled) == 3 and len(told["variants"]) == len(METHODS) + 3
    for one in distilled:
        assert sum(p.numel() for p in load_model(out / one["model"]).parameters()) == one["parameters"]
        assert (out / one["model"] / "metrics.jsonl").is_file()
    assert "line dotted" in (out / "report.html").read_text() and not list((out / "training").iterdir())


@pytest.mark.parametrize("what", ["train", "prune"])
def test_a_killed_command_leaves_nothing_behind_and_goes_on(folder: Path, what: str) -> None:
    """The command alone is killed, as by `kill -9` or for want of memory; what works for it ends too, and the claims that
    it left hold nobody up."""
    shards, out = folder / "images-0.tar", folder / "out"
    training = "steps=200", "checkpoint_every=20", "batch=8", "crops={global_size: 32, local_size: 16}"
    lottery = "method=lottery", "tasks=[rotation]", "rounds=6", "steps=40", "batch=8"
    settings = {"train": (*training, "model={dim: 16, depth: 1, heads: 2}"), "prune": lottery}[what]
    begin = {"train": ("train", out, shards), "prune": ("prune", folder / "lenet", out, shards, "--size", "16")}[what]
    command = (*begin, "--cpus", "2", "--json", *(part for one in settings for part in ("--set", one)))
    reached = {"train": "train/step-*", "prune": "parts/prune_tickets/*/manifest.json"}[what]
    end = out / {"train": "train/summary.json", "prune": "report.json"}[what]
    with Run(command) as run:
        assert run.process is not None
        deadline = time.monotonic() + 300
        while not list(out.glob(reached)):
            assert run.process.poll() is None and time.monotonic() < deadline, run.wait()
            time.sleep(0.02)
        run.kill_driver()
        assert run.gone_within(40), run.processes()  # long before it would be ended by force
    assert not end.exists()
    made = part_manifests(out, "prune_tickets")
    told = json.loads(lodeset(*command)[0])
    assert end.is_file() and (told["train"]["steps"] == 200 if what == "train" else told["variants"])
    assert made.items() <= part_manifests(out, "prune_tickets").items()


def test_mistakes_are_told(folder: Path, prune: Command) -> None:
    shards = folder / "images-0.tar"
    assert "give --size" in prune(folder / "lenet", folder / "out", shards, code=1)[1]
    assert "is not a folder" in prune(folder / "nowhere", folder / "out", shards, code=1)[1]
    assert "holds no model" in prune(folder, folder / "out", shards, code=1)[1]
    assert "did you mean `sweep`" in prune(folder / "vit", folder / "out", shards, "--set", "swep=[1]", code=2)[1]
    told = prune(folder / "vit", folder / "out", shards, "--set", "checkpoint=distill", code=2)[1]
    assert "names a stage of a run" in told
    few = prune(folder / "vit", folder / "out", shards, "--set", "calibration_images=1", code=1)[1]
    assert "cannot determine" in few
