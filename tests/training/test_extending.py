"""The worked examples of an objective and of a backbone."""

import json
from pathlib import Path

from extending import extended, run

# A run of a few steps with the settings of argv[1], on the images of the folder of tests argv[2], into argv[3].
TRAIN = """
import io, json, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
sys.path.append(sys.argv[2])
from builders import write_shards
from lodeset.training.checkpoint import read_checkpoint
from lodeset.training.config import TrainingConfig, identity_of
from lodeset.training.export import load_backbone
from lodeset.training.index import Shards
from lodeset.training.launch import train_inline

def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()

torch.set_num_threads(1)
drawn = np.random.default_rng(0).integers(0, 256, (16, 24, 24, 3), dtype=np.uint8)
folder = Path(sys.argv[3])
(folder / "shards").mkdir(parents=True)
shards = Shards(index=(write_shards(folder / "shards", [png(pixels) for pixels in drawn]),))
small = {
    "steps": 6, "batch": 8, "log_every": 1, "checkpoint_every": 3,
    "model": {"dim": 16, "depth": 2, "heads": 2},
    "crops": {"global_size": 32, "local_size": 16, "local_count": 2},
    "heads": {"prototypes": 12, "hidden": 16, "dino_bottleneck": 8, "ibot_bottleneck": 8},
}
config = TrainingConfig.model_validate(small | json.loads(sys.argv[1]))
assert TrainingConfig.model_validate(config.model_dump(mode="json")) == config
"""

OBJECTIVE = """
summary = train_inline(config, shards, folder / "run")
train_inline(config.model_copy(update={"steps": 3}), shards, folder / "first")
lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
state = read_checkpoint(folder / "run" / "step-0000006", "")
exported = load_backbone(folder / "run").state_dict()
same = all(torch.equal(tensor, state[f"student.backbone.{name}"]) for name, tensor in exported.items())

# Stopped after its checkpoint at step 3, and run again.
for left in ("step-0000006", "summary.json", "model.safetensors"):
    path = folder / "run" / left
    path.rename(folder / f"was-{left}")
again = train_inline(config, shards, folder / "run")
resumed = read_checkpoint(folder / "run" / "step-0000006", "")
import io
from lodeset.training.data import Batches
from lodeset.training.index import open_index
from lodeset.training.loop import looked_at
from lodeset.training.ssl import objective_of
batch = Batches(open_index(shards.index), looked_at(config, objective_of(config).views), 0, 1).load(0)
print(json.dumps({
    "losses": list(summary["losses"]), "logged": sorted(lines[0]), "values": [line["simsiam"] for line in lines],
    "exported": same, "resumed": again["resumed_step"],
    "equal": resumed.keys() == state.keys() and all(torch.equal(state[n], resumed[n]) for n in state),
    "running": [n for n in state if n.endswith("running_mean")], "teacher": any(n.startswith("teacher.") for n in state),
    "identity": identity_of(config)["objective"], "plain": "objective" in identity_of(TrainingConfig()),
    "local": batch.local_crops.numel(), "masks": int(batch.masks.sum()),
}))
"""

REFUSED = """
from lodeset.training.config import TrainingConfig
for objective in ({"kind": "simsiam", "width": 1, "depth": 2}, {"kind": "byol"}, {}):
    try:
        TrainingConfig.model_validate({"objective": objective})
    except ValueError as error:
        print([(problem["loc"], problem["msg"]) for problem in error.errors()])
try:
    TrainingConfig.model_validate({"objective": {"kind": "simsiam"}, "distill": {"model": {}, "steps": 5}})
except ValueError as error:
    print(error)
"""


def test_an_objective_is_one_file_and_one_line(tmp_path: Path) -> None:
    """It trains, logs its own terms, goes on bit by bit from a checkpoint that holds its BatchNorms, and exports the student."""
    copy = extended("An objective", tmp_path)
    asked = json.dumps({"objective": {"kind": "simsiam", "width": 32}})
    found = json.loads(run(copy, TRAIN + OBJECTIVE, asked, str(Path(__file__).parents[1]), str(tmp_path / "world")))
    assert found["losses"] == ["loss", "simsiam"] and "teacher_entropy" not in found["logged"]
    assert {"simsiam", "feature_rank"} <= set(found["logged"])
    assert len(set(found["values"])) == 6 and all(0 < value < 2 for value in found["values"])
    assert found["exported"] and found["resumed"] == 3 and found["equal"]
    assert len(found["running"]) == 2 and not found["teacher"]
    assert found["identity"] == {"kind": "simsiam", "width": 32} and not found["plain"]
    assert (found["local"], found["masks"]) == (0, 0)
    refused = run(copy, REFUSED)
    assert "('objective', 'width')" in refused and "('objective', 'depth')" in refused
    assert refused.count("`kind` must be one of dinov2, simsiam") == 2
    assert "distill needs the heads of DINOv2, not those of simsiam" in refused


BACKBONE = """
from dataclasses import replace
from lodeset.training import cost
from lodeset.training.evaluate import features, layered_features
from lodeset.training.ssl import fresh, make_optimiser
summary = train_inline(config, shards, folder / "run")
model = load_backbone(folder / "run")
state = read_checkpoint(folder / "run" / "step-0000006", "teacher.backbone.")
squares = list(drawn[:4])
layers = layered_features(model, squares, 32, 3)
student = fresh(config).student
optimiser = make_optimiser(student, config.optimiser)
names = {id(p): n for n, p in student.named_parameters()}
groups = {names[id(p)]: group for group in optimiser.param_groups for p in group["params"]}
print(json.dumps({
    "losses": list(summary["losses"]), "kind": json.loads((folder / "run" / "config.json").read_text())["backbone"]["kind"],
    "exported": all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()),
    "changed": not torch.equal(model.state_dict()["blocks.1.across.weight"], student.backbone.state_dict()["blocks.1.across.weight"]),
    "layers": layers.shape, "unit": float((features(model, squares, 32, 3) ** 2).sum()),
    "mean": bool(np.allclose(layers[:, -2], layers[:, -1], atol=1e-6)),
    "factors": {n: groups[f"backbone.{n}"]["lr_factor"] for n in ("patch_embed.weight", "blocks.0.across.weight", "affine.alpha")},
    "decays": [groups[f"backbone.{n}"]["decays"] for n in ("blocks.0.mlp.0.weight", "affine.alpha")],
    "parameters": cost.backbone_parameters(config) / sum(p.numel() for p in model.parameters()),
    "seconds": cost.seconds_per_image(config), "identity": sorted({"model", "backbone"} & identity_of(config).keys()),
    "plain": sorted({"model", "backbone"} & identity_of(TrainingConfig()).keys()),
}))
import onnxruntime
from lodeset.training.onnx import export_onnx
assert not export_onnx(model, folder / "model.onnx", 32)  # of one size
pixels = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 3, 32, 32)).astype(np.float32))
outputs = onnxruntime.InferenceSession(str(folder / "model.onnx")).run(["embedding", "patches"], {"image": pixels.numpy()})
with torch.no_grad():
    expected = model(pixels)
assert np.allclose(outputs[0], expected.cls, atol=1e-5) and np.allclose(outputs[1], expected.patches, atol=1e-5)
from lodeset.pipeline.errors import LodesetError
from lodeset.training.weights import check_weights
try:
    check_weights(str(folder / "run"), config.model)
except LodesetError as error:
    assert "holds a ResMlp: training.weights continues from Vision Transformers alone" in str(error)
else:
    raise AssertionError("weights of another backbone were taken")
"""

MISFITS = """
import sys
from pathlib import Path
from lodeset.infra import dag
from lodeset.infra.config import read
from lodeset.pipeline.errors import ConfigError
file = Path(sys.argv[1]) / "lodeset.yaml"
(file.parent / "images").mkdir()
(file.parent / "images" / "a.png").write_bytes(b"\\x89PNG")
file.write_text("pool: [images/]\\ntraining: {backbone: {kind: resmlp}, crops: {local_count: 0}}\\npruning: [{sweep: [0.1]}]\\n")
try:
    dag.build(read(file))
except ConfigError as error:
    print(error)
from lodeset.training.config import TrainingConfig
one = {"kind": "resmlp", "dim": 16}
for changed in (
    {}, {"crops": {"local_size": 64}, "weights": {"path": "x.pth"}}, {"crops": {"local_count": 0}, "activation_checkpointing": True},
    {"crops": {"local_count": 0}, "finish": {"global_size": 128}},
):
    try:
        TrainingConfig.model_validate({"backbone": one, **changed})
    except ValueError as error:
        print(error)
"""


def test_a_backbone_is_one_file_and_one_line(tmp_path: Path) -> None:
    """It trains with DINOv2's objective, is exported and loaded again, gives features to evaluate, and is told in plans."""
    copy = extended("A backbone", tmp_path)
    asked = json.dumps(
        {"backbone": {"kind": "resmlp", "dim": 16, "depth": 2}, "crops": {"global_size": 32, "local_size": 32}}
    )
    found = json.loads(run(copy, TRAIN + BACKBONE, asked, str(Path(__file__).parents[1]), str(tmp_path / "world")))
    assert found["losses"] == ["loss", "dino", "ibot", "koleo"] and found["kind"] == "resmlp"
    assert found["exported"] and found["changed"]
    assert found["layers"] == [4, 3, 16] and found["mean"] and abs(found["unit"] - 4) < 1e-5
    assert found["factors"] == {
        "patch_embed.weight": 0.2 * 0.9**3,
        "blocks.0.across.weight": 0.9**2,
        "affine.alpha": 1.0,
    }
    assert found["decays"] == [True, False]
    assert abs(found["parameters"] - 1) < 0.1 and found["seconds"] > 0
    assert found["identity"] == ["backbone"] and found["plain"] == ["model"]
    refused = run(copy, MISFITS, str(tmp_path))
    assert "the model of train is a resmlp, and only pruned Vision Transformers can be stored" in refused
    assert "the backbone resmlp takes images of one size: set crops.local_size to 64, or" in refused
    assert "weights is for the Vision Transformer alone" in refused
    assert "activation_checkpointing: the backbone resmlp has none" in refused
    assert "takes images of one size: set finish.global_size to 64" in refused
