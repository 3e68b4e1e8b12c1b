"""Variants and costs of a small transformer."""

import json
from functools import cache
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from pipeline.dag.store import Store
from pipeline.errors import LodesetError
from pruning import graph
from pruning.config import PruneJob
from pruning.entropic import Gram, Solution, path
from pruning.groups import Replacement, apply, check_removal, collect_grams, find_groups, linears
from pruning.report import METHODS, Variant, count_macs, latencies_ms, row, variant
from training.config import ModelConfig
from training.vit import DinoVisionTransformer

JOB = PruneJob(sweep=(1e-4, 1e-2), seed=1)


@cache
def vit() -> DinoVisionTransformer:
    """Two blocks of width 16 on 16-pixel images; of the 64 units of each MLP 44 give next to nothing."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(ModelConfig(patch_size=4, dim=16, depth=2, heads=2), 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for group in find_groups(model).prunable:
            linears(model, group.name)[1].weight[:, torch.randperm(64)[:44]] *= 0.01
    return model.eval()


@cache
def grams() -> dict[str, Gram]:
    batch = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return collect_grams(vit(), find_groups(vit()), [batch], positions_per_image=None, seed=0)


@cache
def all_variants() -> dict[tuple[float, str], Variant]:
    """The sweep as the stage runs it: layers solved and read back from the store, then each variant by itself."""
    groups = find_groups(vit())
    solutions = solved()
    found = [variant(vit(), groups, grams(), JOB, eps, method, solutions) for eps in JOB.sweep for method in METHODS]
    return {(v.eps_w, v.method): v for v in found}


@cache
def solved() -> dict[str, dict[float, Solution]]:
    with TemporaryDirectory() as folder:
        store = Store(folder)
        arrays = {f"{name}/{field}": array for name, gram in grams().items() for field, array in gram.arrays().items()}
        moments = graph._commit_arrays(store, graph.GRAMS, "all", "moments", arrays, 64, 0.0).files["moments"]
        solve = graph._solver(store, [moments], JOB)
        parts = [solve((f"key-{n}", group.name)) for n, group in enumerate(find_groups(vit()).prunable)]
        return graph._solutions(store, [part.files["solution"] for part in parts])


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


def test_solutions_read_back_are_those_of_the_path() -> None:
    for name, by_eps in solved().items():
        for eps, here in path(grams()[name], name, JOB).items():
            there = by_eps[eps]
            assert (there.converged, there.unexplained, there.history) == (
                here.converged,
                here.unexplained,
                here.history,
            )
            for field in ("support", "q", "bias"):
                np.testing.assert_array_equal(getattr(there, field), getattr(here, field))


@pytest.mark.parametrize("eps_w", JOB.sweep)
def test_refit_lowers_the_error_and_the_choice_of_units_matters(eps_w: float) -> None:
    for layer in ("blocks.0.mlp", "blocks.1.mlp"):
        lost: dict[str, float] = {method: all_variants()[eps_w, method].unexplained[layer] for method in METHODS}
        for choice in ("entropic", "magnitude", "random"):
            assert lost[f"{choice}+refit"] < lost[choice]
        assert lost["entropic+refit"] < 0.5 * lost["random+refit"]


def test_unexplained_is_the_error_on_the_calibration_tokens() -> None:
    """Of the first block, whose input pruning does not change."""
    chosen = all_variants()[1e-2, "magnitude"]
    outputs: list[torch.Tensor] = []
    batch = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for model in (vit(), apply(vit(), chosen.layers)):
        hook = linears(model, "blocks.0.mlp")[1].register_forward_hook(lambda _m, _a, out: outputs.append(out))
        with torch.no_grad():
            model(batch)
        hook.remove()
    dense, pruned = (out.double() for out in outputs)
    expected = (pruned - dense).square().mean() / (dense - dense.mean(0)).square().mean()
    assert chosen.unexplained["blocks.0.mlp"] == pytest.approx(expected.item(), rel=1e-4)


def test_magnitude_without_refit_keeps_the_dense_weights() -> None:
    new = all_variants()[1e-2, "magnitude"].layers["blocks.0.mlp"]
    fc1, fc2 = linears(vit(), "blocks.0.mlp")
    np.testing.assert_array_equal(new.weight.astype(np.float32), fc2.weight.detach().numpy()[:, new.keep])
    np.testing.assert_array_equal(new.bias.astype(np.float32), fc2.bias.detach().numpy())
    score = fc1.weight.detach().norm(dim=1) * fc2.weight.detach().norm(dim=0)
    assert score[new.keep].min() >= np.delete(score.numpy(), new.keep).max()


def test_a_strength_outside_the_sweep_and_foreign_moments_are_refused() -> None:
    with pytest.raises(LodesetError, match=r"eps_w 0\.5 is not in the sweep \[0\.0001, 0\.01\]"):
        variant(vit(), find_groups(vit()), grams(), JOB, 0.5, "random", solved())
    smaller = apply(vit(), all_variants()[1e-2, "entropic"].layers)
    with pytest.raises(LodesetError, match=r"blocks\.0\.mlp: the moments cover 64 units and the model has"):
        variant(smaller, find_groups(smaller), grams(), JOB, 1e-2, "random", solved())
    with pytest.raises(LodesetError, match="cover 0 units"):
        variant(vit(), find_groups(vit()), {}, JOB, 1e-2, "random", solved())


def test_macs_by_hand() -> None:
    tokens, dim, hidden = 17, 16, 64
    patches = 16 * dim * 3 * 4 * 4
    attention = tokens * dim * 3 * dim + tokens * dim * dim + 2 * tokens * tokens * dim
    assert count_macs(vit(), 16) == patches + 2 * (attention + 2 * tokens * dim * hidden)


def test_latencies_of_every_model() -> None:
    small = DinoVisionTransformer(ModelConfig(patch_size=8, dim=16, depth=1, heads=2), 16)
    large = DinoVisionTransformer(ModelConfig(patch_size=4, dim=128, depth=6, heads=2), 16)
    taken = latencies_ms({"small": small, "large": large}, 16, batch=2, rounds=3)
    assert 0 < taken["small"]["median"] < taken["large"]["median"]
    assert taken["small"]["spread"] >= 0


def test_row_says_what_was_removed() -> None:
    chosen = all_variants()[1e-2, "entropic+refit"]
    pruned = apply(vit(), chosen.layers)
    kept = sum(len(new.keep) for new in chosen.layers.values())
    line = row(chosen, pruned, vit(), 16)
    assert json.loads(json.dumps(line)) == line
    dense = sum(p.numel() for p in vit().parameters())
    assert line["channels"] == kept
    assert line["channels_removed"] == pytest.approx(1 - kept / 128)
    assert line["parameters"] == dense - (128 - kept) * (16 + 1 + 16)
    assert line["parameters_removed"] == pytest.approx((128 - kept) * 33 / dense)
    assert line["macs"] == count_macs(vit(), 16) - (128 - kept) * 2 * 17 * 16
    zeros = sum(int((p == 0).sum()) for p in pruned.parameters())
    assert line["density"] == pytest.approx((dense - (128 - kept) * 33 - zeros) / dense)
    latency = line["latency_ms"]
    assert isinstance(latency, dict)
    assert set(latency) == {"batch_1", "batch_32"}


def test_variants_survive_removal_at_every_level() -> None:
    batch = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    for chosen in all_variants().values():
        new: dict[str, Replacement] = chosen.layers
        assert check_removal(apply(vit(), new), vit(), new, batch) <= 1e-4
