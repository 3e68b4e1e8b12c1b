"""Strengths by group, so that a share of the parameters goes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from networks import LeNet, Residual, images, shaken, vit
from torch import nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.allocation import Level, Sizes, allocate
from lodeset.pruning.choosing.variants import solved_at_once, variant
from lodeset.pruning.config import PruneJob
from lodeset.pruning.units.activations import collect_grams
from lodeset.pruning.units.folding import folded
from lodeset.pruning.units.groups import Group, Reader, find_groups
from lodeset.pruning.units.removal import apply


@pytest.mark.parametrize("network", [LeNet, Residual, vit])
def test_sizes_are_those_of_the_pruned_model(network: type[nn.Module]) -> None:
    model = shaken(network())
    if network is Residual:
        model = folded(model, images(2))
    groups = find_groups(model, images(2)).prunable
    grams = collect_grams(model, groups, [images(64)], positions_per_image=None, seed=0)
    job = PruneJob(sweep=(0.05,))
    solved, _, refused = solved_at_once(groups, grams, job)
    assert not refused
    chosen = variant(model, groups, grams, job, "random", {name: of[0.05] for name, of in solved.items()})
    pruned, _ = apply(model, groups, chosen.layers, images(2))
    kept = {group.name: len(chosen.layers[group.name].keep) / group.units for group in groups}
    assert min(kept.values()) < 1
    sizes = Sizes.of(model, groups)
    assert sizes.dense == sum(p.numel() for p in model.parameters())
    assert sizes.parameters(kept) == pytest.approx(sum(p.numel() for p in pruned.parameters()))


def branches(widths: tuple[int, ...]) -> tuple[nn.Module, list[Group]]:
    """Layers side by side, so that what a group saves does not depend on the others."""
    model = nn.ModuleDict()
    groups = []
    for number, width in enumerate(widths):
        model[f"in{number}"], model[f"out{number}"] = nn.Linear(4, width), nn.Linear(width, 3)
        units = np.arange(width)
        groups.append(Group(f"g{number}", width, (Reader(f"in{number}", units),), (Reader(f"out{number}", units),)))
    return model, groups


@pytest.mark.parametrize("seed", range(10))
def test_no_other_strengths_save_as_much_and_lose_less(seed: int) -> None:
    """Of all 5^3, where losses grow ever faster with what is saved."""
    rng = np.random.default_rng(seed)
    model, groups = branches((10, 20, 30))
    levels = {}
    for group in groups:
        saved = np.concatenate([[0.0], np.sort(rng.choice(np.arange(1, 10), 4, replace=False)) / 10])
        rates = np.sort(rng.random(4)) * rng.random()
        lost = np.concatenate([[0.0], np.cumsum(np.diff(saved) * rates)])
        levels[group.name] = [Level(0.1 * k, 1 - saved[k], lost[k]) for k in range(5)]
    sizes = Sizes.of(model, groups)
    chosen = allocate(sizes, levels, 0.4)

    def of(strengths: tuple[Level, ...]) -> tuple[float, float]:
        left = sizes.parameters({name: level.kept for name, level in zip(levels, strengths, strict=True)})
        return left, sum(level.lost for level in strengths)

    left, lost = of(tuple(next(level for level in levels[name] if level.eps_w == eps) for name, eps in chosen.items()))
    assert left <= 0.6 * sizes.dense
    assert all(
        others_lost >= lost - 1e-12
        for others_left, others_lost in map(of, product(*levels.values()))
        if others_left <= left
    )


def test_what_loses_nothing_goes_first() -> None:
    model, groups = branches((10, 20))
    levels = {
        "g0": [Level(0.1, 1.0, 0.0), Level(0.2, 0.5, 0.0)],
        "g1": [Level(0.1, 1.0, 0.0), Level(0.2, 0.1, 0.3)],
    }
    assert allocate(Sizes.of(model, groups), levels, 0.01) == {"g0": 0.2, "g1": 0.0}


def test_more_than_the_strongest_penalty_removes_is_refused() -> None:
    model, groups = branches((10, 20))
    levels = {name: [Level(0.1, 1.0, 0.0), Level(0.2, 0.5, 0.1)] for name in ("g0", "g1")}
    with pytest.raises(
        LodesetError, match=r"remove 0\.9: at the strongest penalty of sweep, 0\.2, 4\d\.\d% of the .* ask for less"
    ):
        allocate(Sizes.of(model, groups), levels, 0.9)


def test_the_last_step_is_the_cheapest_that_suffices() -> None:
    """And what is not needed stays whole."""
    model, groups = branches((10, 10))
    levels = {name: [Level(0.1, 0.6, 0.1), Level(0.2, 0.1, 0.11)] for name in ("g0", "g1")}
    sizes = Sizes.of(model, groups)
    saved = 1 - sizes.parameters({"g0": 0.6, "g1": 1.0}) / sizes.dense
    assert sorted(allocate(sizes, levels, saved - 0.01).values()) == [0.0, 0.1]
    assert sorted(allocate(sizes, levels, saved + 0.01).values()) == [0.0, 0.2]


def test_levels_that_cannot_be_used_or_keep_more_at_a_stronger_penalty() -> None:
    model, groups = branches((10, 10))
    levels = {
        "g0": [Level(0.1, 0.5, float("nan")), Level(0.2, 0.4, float("inf"))],
        "g1": [Level(0.1, 0.2, 0.5), Level(0.2, 0.3, 0.1)],
    }
    sizes = Sizes.of(model, groups)
    least = 1 - sizes.parameters({"g0": 1.0, "g1": 0.2}) / sizes.dense
    assert allocate(sizes, levels, least) == {"g0": 0.0, "g1": 0.1}
    with pytest.raises(LodesetError, match="ask for less"):
        allocate(sizes, levels, least + 0.01)
