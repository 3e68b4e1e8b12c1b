"""Finding, measuring, removing and storing hidden units of a small transformer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import LodesetError
from pruning.entropic import Gram
from pruning.groups import (
    Replacement,
    apply,
    check_removal,
    collect_grams,
    find_groups,
    linears,
    load_pruned,
    masked,
    max_difference,
    sample_positions,
    save_pruned,
)
from training.config import ModelConfig
from training.vit import DinoVisionTransformer


def small_vit(ffn: str = "mlp", registers: int = 0) -> DinoVisionTransformer:
    """Two blocks of width 16 on 16-pixel images with weights large enough that every unit matters."""
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {"patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "ffn": ffn, "registers": registers}
    )
    model = DinoVisionTransformer(config, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def random_replacements(model: nn.Module, kept: int) -> dict[str, Replacement]:
    rng = np.random.default_rng(0)
    found = {}
    for group in find_groups(model).prunable:
        keep = np.sort(rng.choice(group.units, kept, replace=False))
        found[group.name] = Replacement(keep, rng.normal(size=(16, kept)), rng.normal(size=16))
    return found


def test_groups_of_a_vit_and_why_the_rest_is_left() -> None:
    groups = find_groups(small_vit())
    assert [(g.name, g.units) for g in groups.prunable] == [("blocks.0.mlp", 64), ("blocks.1.mlp", 64)]
    assert set(groups.skipped) == {"patch_embed.proj", "blocks.0.attn", "blocks.1.attn"}
    assert "residual stream" in groups.skipped["patch_embed.proj"]
    assert "heads" in groups.skipped["blocks.0.attn"]


def test_a_model_without_plain_mlps_is_refused_with_the_reasons() -> None:
    with pytest.raises(LodesetError, match=r"nothing to prune.*blocks\.0\.mlp: gated feed-forward"):
        find_groups(small_vit("swiglu"))


def test_layers_that_do_not_pair_up_are_skipped() -> None:
    model = nn.Sequential(small_vit(), nn.Module())
    model[1].add_module("fc1", nn.Linear(4, 8))
    model[1].add_module("fc2", nn.Linear(4, 2))
    groups = find_groups(model)
    assert [g.name for g in groups.prunable] == ["0.blocks.0.mlp", "0.blocks.1.mlp"]
    assert groups.skipped["1"].startswith("fc1 gives 8 values and fc2 takes 4")


def test_grams_equal_those_of_activations_taken_by_hand() -> None:
    """x is gelu(fc1(.)) of all tokens, y is fc2's output with its bias, also when batches are split."""
    model = small_vit(registers=2)
    batch = images(6)
    grams = collect_grams(model, find_groups(model), [batch[:4], batch[4:]], positions_per_image=None, seed=0)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule("blocks.1.norm2").register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(batch)
    handle.remove()
    fc1, fc2 = linears(model, "blocks.1.mlp")
    with torch.no_grad():
        x = nn.functional.gelu(fc1(seen[0]))
        expected = Gram.from_activations(x, fc2(x))
    assert expected.count == 6 * (1 + 2 + 16)
    for name, array in grams["blocks.1.mlp"].arrays().items():
        np.testing.assert_allclose(array, expected.arrays()[name], rtol=1e-5, atol=1e-4)


def test_drawn_positions_do_not_depend_on_batches_or_workers() -> None:
    model = small_vit()
    groups, batch = find_groups(model), images(8)
    whole = collect_grams(model, groups, [batch], positions_per_image=5, seed=1)
    first = collect_grams(model, groups, [batch[:2], batch[2:3]], positions_per_image=5, seed=1)
    second = collect_grams(model, groups, [batch[3:]], positions_per_image=5, seed=1, first_image=3)
    other = collect_grams(model, groups, [batch], positions_per_image=5, seed=2)
    for name, gram in whole.items():
        assert gram.count == 40
        np.testing.assert_allclose((first[name] + second[name]).xx, gram.xx, rtol=1e-4, atol=1e-4)
        assert not np.allclose(other[name].xx, gram.xx, rtol=1e-4, atol=1e-4)


def test_drawn_positions_are_distinct_and_reach_every_token() -> None:
    drawn = [sample_positions(image, 17, 5, seed=0) for image in range(50)]
    assert all(len(set(d)) == 5 and list(d) == sorted(d) for d in drawn)
    assert set(np.concatenate(drawn)) == set(range(17))
    np.testing.assert_array_equal(sample_positions(0, 17, 40, seed=0), np.arange(17))


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = small_vit()
    model.train()
    model.norm.eval()
    collect_grams(model, find_groups(model), [images(2)], positions_per_image=None, seed=0)
    assert model.training
    assert not model.norm.training
    assert not any(module._forward_hooks for module in model.modules())


def test_no_images_is_an_error() -> None:
    model = small_vit()
    with pytest.raises(LodesetError, match="no calibration images"):
        collect_grams(model, find_groups(model), [], positions_per_image=None, seed=0)


@pytest.mark.parametrize("registers", [0, 2])
def test_pruned_and_masked_models_agree(registers: int) -> None:
    model = small_vit(registers=registers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = random_replacements(model, 10)
    pruned = apply(model, new)
    assert [g.units for g in find_groups(pruned).prunable] == [10, 10]
    assert check_removal(pruned, model, new, images(4)) <= 1e-4
    assert max_difference(pruned, model, images(4)) > 0.1
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_keeping_everything_changes_nothing() -> None:
    model = small_vit()
    new = {}
    for group in find_groups(model).prunable:
        _, fc2 = linears(model, group.name)
        new[group.name] = Replacement(
            np.arange(64), fc2.weight.detach().double().numpy(), fc2.bias.detach().double().numpy()
        )
    assert max_difference(apply(model, new), model, images(4)) == 0.0
    assert max_difference(masked(model, new), model, images(4)) == 0.0


def test_check_removal_notices_a_unit_that_something_else_reads() -> None:
    """With a softmax between the layers every unit depends on all others, so removal is not the same as zeroing."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 8), nn.Linear(8, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc2(self.fc1(x.mean((2, 3))).softmax(-1))
            return out

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("mlp", Mixed())
    new = random_replacements(model, 4)
    with pytest.raises(LodesetError, match="differ by"):
        check_removal(apply(model, new), model, new, images(4))


def test_layers_without_bias_get_one() -> None:
    model = small_vit()
    mlp = model.get_submodule("blocks.0.mlp")
    mlp.add_module("fc1", nn.Linear(16, 64, bias=False))
    mlp.add_module("fc2", nn.Linear(64, 16, bias=False))
    new = random_replacements(model, 10)
    pruned = apply(model, new)
    assert linears(pruned, "blocks.0.mlp")[0].bias is None
    assert check_removal(pruned, model, new, images(4)) <= 1e-4


def test_saved_models_come_back_equal(tmp_path: Path) -> None:
    model = small_vit(registers=2)
    pruned = apply(model, random_replacements(model, 10))
    save_pruned(pruned, tmp_path / "model")
    again = load_pruned(tmp_path / "model")
    assert max_difference(again, pruned, images(4)) == 0.0
    assert [g.units for g in find_groups(again).prunable] == [10, 10]
    assert not again.training


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model = small_vit()
    with pytest.raises(LodesetError, match="does not hold a pruned model"):
        load_pruned(tmp_path)
    save_pruned(apply(model, random_replacements(model, 10)), tmp_path)
    description = json.loads((tmp_path / "architecture.json").read_text())
    description["hidden"]["blocks.0.mlp"] = 11
    (tmp_path / "architecture.json").write_text(json.dumps(description))
    with pytest.raises(LodesetError, match="size mismatch"):
        load_pruned(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(LodesetError, match="does not hold a pruned model"):
        load_pruned(tmp_path)
