"""Variants and costs of a small transformer."""

import json
from functools import cache
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from networks import images, replaced_at_random
from torch import Tensor, nn

from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.criteria import METHODS
from lodeset.pruning.choosing.entropic import Solution, path
from lodeset.pruning.choosing.variants import Variant, layers_of, variant
from lodeset.pruning.config import PruneJob
from lodeset.pruning.jobs import sweep_parts as parts
from lodeset.pruning.jobs.cost import count_macs, latencies_ms, row
from lodeset.pruning.units.activations import collect_grams
from lodeset.pruning.units.groups import Group, find_groups, layer_of
from lodeset.pruning.units.moments import Gram
from lodeset.pruning.units.removal import apply
from lodeset.training.config import CropsConfig, ModelConfig
from lodeset.training.vit import DinoVisionTransformer

JOB = PruneJob(sweep=(1e-4, 1e-2), seed=1)


@cache
def vit() -> DinoVisionTransformer:
    """Two blocks of width 16 on 16-pixel images; of the 64 units of each MLP 44 give next to nothing."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(ModelConfig(patch_size=4, dim=16, depth=2, heads=2), 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for block in model.blocks:
            layer_of(block, "mlp.fc2").weight[:, torch.randperm(64)[:44]] *= 0.01
    return model.eval()


@cache
def groups() -> tuple[Group, ...]:
    """Hidden units, not attention heads."""
    return tuple(group for group in find_groups(vit(), images(2)).prunable if group.heads is None)


@cache
def grams() -> dict[str, Gram]:
    return collect_grams(vit(), groups(), [images(64)], positions_per_image=None, seed=0)


@cache
def all_variants() -> dict[tuple[float, str], Variant]:
    """The sweep as the stage runs it: layers solved and read back from the store, then each variant by itself."""
    return {
        (eps, method): variant(vit(), groups(), grams(), JOB, method, solved(eps))
        for eps in JOB.sweep
        for method in METHODS
    }


@cache
def solved(eps: float) -> dict[str, Solution]:
    with TemporaryDirectory() as folder:
        store = Store(folder)
        arrays = {f"{name}/{field}": array for name, gram in grams().items() for field, array in gram.arrays().items()}
        moments = parts.commit_arrays(store, parts.GRAMS, "all", "moments", arrays, 64, 0.0).files["moments"]
        setting = parts.Setting(store, "", (), 16, 1, 1, (), "", CropsConfig())
        solve = parts.solver(setting, [moments], (), JOB)
        made = [solve((f"key-{n}", (group,), None)) for n, group in enumerate(groups())]
        files = [part.files["solution"] for part in made]
        found, refused = parts.choices(store, files)
        assert list(found) == [group.name for group in groups()] and not refused
        return parts.solutions(store, files, dict.fromkeys(found, eps))


def test_every_method_at_every_level() -> None:
    assert list(all_variants()) == [(eps, method) for eps in (1e-4, 1e-2) for method in METHODS]
    assert all(v.converged for v in all_variants().values())


def test_methods_are_compared_at_the_same_number_of_units_in_each_layer() -> None:
    for eps in JOB.sweep:
        counts = [
            {name: len(new.keep) for name, new in all_variants()[eps, method].layers.items()} for method in METHODS
        ]
        assert all(count == counts[0] for count in counts)
        assert all(0 < kept < 64 for kept in counts[0].values())


def test_units_are_kept_by_the_dozen_where_that_is_asked_for() -> None:
    rounded = JOB.model_copy(update={"round_to": 12})
    for method in METHODS:
        plain = all_variants()[1e-2, method]
        chosen = variant(vit(), groups(), grams(), rounded, method, solved(1e-2))
        for name, new in chosen.layers.items():
            before = plain.layers[name].keep
            assert len(new.keep) == -(-len(before) // 12) * 12 and set(before) <= set(new.keep)
        for reader, lost in chosen.unexplained.items():
            assert not method.endswith("+refit") or lost <= plain.unexplained[reader] + 1e-9


def test_solutions_read_back_are_those_of_the_path() -> None:
    for group in groups():
        for eps, here in path(layers_of(group, grams()), group.units, JOB).items():
            there = solved(eps)[group.name]
            assert (there.converged, there.history) == (here.converged, here.history)
            np.testing.assert_array_equal(there.support, here.support)
            np.testing.assert_array_equal(there.w, here.w)
            assert len(there.layers) == len(here.layers) == 1
            assert there.layers[0].unexplained == here.layers[0].unexplained
            for field in ("q", "bias"):
                np.testing.assert_array_equal(getattr(there.layers[0], field), getattr(here.layers[0], field))


@pytest.mark.parametrize("eps_w", JOB.sweep)
def test_refit_lowers_the_error_and_the_choice_of_units_matters(eps_w: float) -> None:
    for layer in ("blocks.0.mlp.fc2", "blocks.1.mlp.fc2"):
        lost: dict[str, float] = {method: all_variants()[eps_w, method].unexplained[layer] for method in METHODS}
        for choice in ("entropic", "magnitude", "random"):
            assert lost[f"{choice}+refit"] < lost[choice]
        assert lost["entropic+refit"] < 0.5 * lost["random+refit"]


def test_unexplained_is_the_error_on_the_calibration_tokens() -> None:
    """Of the first block, whose input pruning does not change."""
    chosen = all_variants()[1e-2, "magnitude"]
    outputs: list[torch.Tensor] = []
    for model in (vit(), apply(vit(), groups(), chosen.layers, images(2))[0]):
        hook = layer_of(model, "blocks.0.mlp.fc2").register_forward_hook(lambda _m, _a, out: outputs.append(out))
        with torch.no_grad():
            model(images(64))
        hook.remove()
    dense, pruned = (out.double() for out in outputs)
    expected = (pruned - dense).square().mean() / (dense - dense.mean(0)).square().mean()
    assert chosen.unexplained["blocks.0.mlp.fc2"] == pytest.approx(expected.item(), rel=1e-4)


def test_magnitude_without_refit_keeps_the_dense_weights() -> None:
    replacement = all_variants()[1e-2, "magnitude"].layers["blocks.0.mlp.fc1"]
    new = replacement.readers["blocks.0.mlp.fc2"]
    fc1, fc2 = (layer_of(vit(), f"blocks.0.mlp.{name}") for name in ("fc1", "fc2"))
    assert fc2.bias is not None
    weight = fc2.weight.detach().numpy()
    np.testing.assert_array_equal(new.weight.astype(np.float32)[:, replacement.keep], weight[:, replacement.keep])
    np.testing.assert_array_equal(new.bias.astype(np.float32), fc2.bias.detach().numpy())
    score = fc1.weight.detach().norm(dim=1) * fc2.weight.detach().norm(dim=0)
    assert score[replacement.keep].min() >= np.delete(score.numpy(), replacement.keep).max()


def test_foreign_moments_are_refused() -> None:
    smaller, _ = apply(vit(), groups(), all_variants()[1e-2, "entropic"].layers, images(2))
    left = [group for group in find_groups(smaller, images(2)).prunable if group.heads is None]
    with pytest.raises(LodesetError, match=r"blocks\.0\.mlp\.fc2: the moments cover 64 inputs and the layer takes"):
        variant(smaller, left, grams(), JOB, "random", solved(1e-2))
    with pytest.raises(LodesetError, match="cover 0 inputs"):
        variant(vit(), groups(), {}, JOB, "random", solved(1e-2))


def test_macs_by_hand() -> None:
    tokens, dim, hidden = 17, 16, 64
    patches = 16 * dim * 3 * 4 * 4
    attention = tokens * dim * 3 * dim + tokens * dim * dim + 2 * tokens * tokens * dim
    assert count_macs(vit(), images(2)) == patches + 2 * (attention + 2 * tokens * dim * hidden)


class Mixer(nn.Module):
    """Attention as others write it: three layers, and products that no module stands for."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.embed = fused, nn.Conv2d(3, 12, 4, 4, groups=3)
        self.query, self.key, self.value = (nn.Linear(12, 12, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        query, key, value = (
            layer(tokens).unflatten(2, (2, 6)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        if self.fused:
            return nn.functional.scaled_dot_product_attention(query, key, value)
        return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(query @ key.transpose(2, 3), dim=-1), value)


@pytest.mark.parametrize("fused", [True, False])
def test_macs_of_attention_of_another_hand(fused: bool) -> None:
    tokens, dim = 16, 12
    assert count_macs(Mixer(fused), images(2)) == tokens * dim * 16 + 3 * tokens * dim**2 + 2 * tokens**2 * dim


def test_latencies_of_every_model() -> None:
    small = DinoVisionTransformer(ModelConfig(patch_size=8, dim=16, depth=1, heads=2), 16)
    large = DinoVisionTransformer(ModelConfig(patch_size=4, dim=384, depth=8, heads=2), 16)
    taken = latencies_ms({"small": small, "large": large}, images(1), batch=8, rounds=5)
    assert 0 < taken["small"]["median"] < taken["large"]["median"]
    assert taken["small"]["spread"] >= 0


def test_row_says_what_was_removed() -> None:
    chosen = all_variants()[1e-2, "entropic+refit"]
    pruned, _ = apply(vit(), groups(), chosen.layers, images(2))
    kept = sum(len(new.keep) for new in chosen.layers.values())
    line = row(chosen, groups(), pruned, vit(), images(2))
    assert json.loads(json.dumps(line)) == line
    dense = sum(p.numel() for p in vit().parameters())
    assert line["channels"] == kept
    assert line["channels_removed"] == pytest.approx(1 - kept / 128)
    assert line["parameters"] == dense - (128 - kept) * (16 + 1 + 16)
    assert line["parameters_removed"] == pytest.approx((128 - kept) * 33 / dense)
    assert line["macs"] == count_macs(vit(), images(2)) - (128 - kept) * 2 * 17 * 16
    zeros = sum(int((p == 0).sum()) for p in pruned.parameters())
    assert line["density"] == pytest.approx((dense - (128 - kept) * 33 - zeros) / dense)
    latency = line["latency_ms"]
    assert isinstance(latency, dict)
    assert set(latency) == {"batch_1", "batch_32"}


def test_variants_survive_removal_at_every_level() -> None:
    for chosen in all_variants().values():
        assert apply(vit(), groups(), chosen.layers, images(4, seed=5))[1] <= 1e-4


def test_macs_of_a_model_with_fewer_heads() -> None:
    heads = tuple(group for group in find_groups(vit(), images(2)).prunable if group.heads is not None)
    pruned, _ = apply(vit(), heads, replaced_at_random(vit(), heads, 1), images(2))
    tokens, dim = 17, 16
    removed = 2 * (tokens * dim * 3 * 8 + 8 * tokens * dim + 2 * tokens * tokens * 8)
    assert count_macs(pruned, images(2)) == count_macs(vit(), images(2)) - removed
