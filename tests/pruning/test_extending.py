"""The worked example of a pruning criterion."""

from pathlib import Path

from extending import extended, run

SCRIPT = """
import numpy as np, torch
from lodeset.pruning.choosing.criteria import METHODS, REFITTED
from lodeset.pruning.choosing.variants import solved_at_once, variant
from lodeset.pruning.config import LotteryJob, PruneJob
from lodeset.pruning.specs import PruneSpec
from lodeset.pruning.units.activations import collect_grams
from lodeset.pruning.units.groups import find_groups
from lodeset.training.config import ModelConfig
from lodeset.training.vit import DinoVisionTransformer

torch.manual_seed(0)
model = DinoVisionTransformer(ModelConfig(patch_size=4, dim=16, depth=1, heads=2), 16).eval()
groups = [group for group in find_groups(model, torch.randn(2, 3, 16, 16)).prunable if group.heads is None]
batch, taken = torch.randn(32, 3, 16, 16), []
handle = model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda _m, args: taken.append(args[0].flatten(0, -2)))
with torch.no_grad():
    model.forward(batch)
handle.remove()
carried = model.blocks[0].mlp.fc2.weight.detach().norm(dim=0) * taken[0].square().mean(0).sqrt()

job = PruneJob(sweep=(1e-2,))
grams = collect_grams(model, groups, [batch], positions_per_image=None, seed=0)
solved, _, refused = solved_at_once(groups, grams, job)
at = {name: by_eps[1e-2] for name, by_eps in solved.items()}
kept = {method: variant(model, groups, grams, job, method, at).layers["blocks.0.mlp.fc1"].keep for method in METHODS}
count = len(kept["entropic"])
assert not refused and 0 < count < 64
for method in ("carried", "carried+refit"):
    assert kept[method].tolist() == sorted(np.argsort(-carried.numpy())[:count].tolist())
assert kept["magnitude"].tolist() != kept["carried"].tolist()
assert REFITTED[-1] == "carried+refit"

lottery = LotteryJob(method="lottery")
print([PruneSpec(jobs=(one,), targets=()).identity().get("criteria") for one in (job, lottery)])
"""


def test_a_criterion_is_one_file_and_one_line(tmp_path: Path) -> None:
    """It chooses what an independent computation does, with every other method beside it, and enters the fingerprint of a sweep."""
    assert run(extended("A pruning criterion", tmp_path), SCRIPT).strip() == "[['carried'], None]"


def test_no_torch_to_know_the_criteria(tmp_path: Path) -> None:
    """A plan reads their names."""
    code = (
        "import sys; from lodeset.pruning.choosing.criteria import METHODS; print(len(METHODS), 'torch' in sys.modules)"
    )
    assert run(extended("A pruning criterion", tmp_path), code).split() == ["8", "False"]
