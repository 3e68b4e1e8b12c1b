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
