"""Tasks learn something, rounds start where they should, and units that are masked can be taken out."""

from __future__ import annotations

import functools

import cv2
import numpy as np
import pytest
import torch
from networks import LeNet, Residual, images, shaken, vit
from torch import nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.learning.examples import Examples, Gallery
from lodeset.pruning.learning.loop import Recipe
from lodeset.pruning.learning.lottery import (
    again,
    begin,
    fresh,
    next_masks,
    random_masks,
    state_of,
    unit_masks,
    units_kept,
    without_units,
)
from lodeset.pruning.learning.masks import cut, density, everything, maskable
from lodeset.pruning.learning.self_masking import learn_masks, masked_network, scaled
from lodeset.pruning.learning.tasks import TaskName, features_of, make_task
from lodeset.pruning.units.groups import find_groups
from lodeset.pruning.units.removal import apply
from lodeset.training.config import CropsConfig

CROPS = CropsConfig(
    global_size=16, local_count=0, global_scale=(0.8, 1.0), blur=(0.0, 0.0, 0.0), solarise=0.0, grey=0.0, hue=0.0
)
RECIPE = Recipe(steps=30, lr=3e-3, weight_decay=0.01, warmup=0.1, seed=0)


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    """Five colours, brighter on top: what colour is to be told, and which side is up."""
    rng = np.random.default_rng(0)
    codes = rng.integers(5, size=60)
    colours = rng.integers(40, 216, size=(5, 3))
    shade = np.linspace(1.2, 0.4, 20)[:, None, None]
    drawn = [
        (np.ones((20, 20, 3)) * colours[code] * shade + rng.normal(0, 8, (20, 20, 3))).clip(0, 255) for code in codes
    ]
    data = tuple(cv2.imencode(".png", one.astype(np.uint8))[1].tobytes() for one in drawn)
    return Gallery(data, codes, 5)


def examples_of(gallery: Gallery, batch: int = 16) -> Examples:
    return Examples(gallery, gallery.codes, CROPS, batch, 0, 10**6)


@pytest.mark.parametrize("name", ["labels", "rotation", "dino", "swav"])
def test_every_task_goes_down_and_gives_the_same_again(name: TaskName, gallery: Gallery) -> None:
    torch.manual_seed(0)
    first = fresh(LeNet(), 0)
    found = []
    for _ in range(2):
        network = fresh(first, 1)
        task = make_task(name, network, 5, gallery.classes, 0, prototypes=8, queue=32)
        before = loss_of(network, task, gallery)
        _, loss = begin(network, task, examples_of(gallery), RECIPE, rewind=5)
        found.append((loss, state_of(network)))
        assert loss < 0.97 * before
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][key], found[1][1][key]) for key in found[0][1])


def test_dropout_is_drawn_by_the_seed(gallery: Gallery) -> None:
    found = []
    for _ in range(2):
        network = nn.Sequential(fresh(LeNet(), 0), nn.Dropout(0.5))
        task = make_task("labels", network, 5, 5, 0)
        found.append(begin(network, task, examples_of(gallery), Recipe(4, 1e-3, 0.0, 0.0, 0), rewind=2)[1])
        torch.rand(3)  # as other work of the same process would
    assert found[0] == found[1]


def loss_of(network: nn.Module, task: nn.Module, gallery: Gallery) -> float:
    views, codes = examples_of(gallery, 60).at(0)
    with torch.no_grad():
        return float(task(functools.partial(features_of, network), views, codes, torch.Generator().manual_seed(0), 0.0))


def test_a_round_starts_at_the_rewound_weights_and_trains_what_is_left(gallery: Gallery) -> None:
    network = fresh(LeNet(), 0)
    task = make_task("dino", network, 5, 5, 0)
    start, _ = begin(network, task, examples_of(gallery), RECIPE, rewind=5)
    masks = next_masks(network, everything(network), 0.5, "global", None)
    still = Recipe(steps=6, lr=1e-12, weight_decay=0.0, warmup=0.0, seed=0)
    again(network, task, start, masks, examples_of(gallery), still, rewind=5)
    for name, weight in maskable(network).items():
        torch.testing.assert_close(weight.detach(), start.network[name] * masks[name])
    again(network, task, start, masks, examples_of(gallery), RECIPE, rewind=5)
    for name, weight in maskable(network).items():
        assert (weight[~masks[name]] == 0).all() and (weight[masks[name]] != start.network[name][masks[name]]).any()


def test_the_dense_network_made_in_one_go_or_from_the_start_on(gallery: Gallery) -> None:
    network = fresh(LeNet(), 0)
    task = make_task("labels", network, 5, 5, 0)
    recipe = Recipe(steps=12, lr=1e-3, weight_decay=0.01, warmup=0.0, seed=0)
    start, loss = begin(network, task, examples_of(gallery), recipe, rewind=4)
    made = state_of(network)
    assert again(network, task, start, everything(network), examples_of(gallery), recipe, rewind=4) == loss
    assert all(torch.equal(made[name], tensor) for name, tensor in state_of(network).items())


@pytest.mark.parametrize("model", [LeNet(), Residual(), vit()], ids=["lenet", "residual", "vit"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_units_that_are_masked_can_be_taken_out(model: nn.Module, scope: str) -> None:
    model = shaken(model)
    groups = find_groups(model, images(2)).prunable
    masks = everything(model)
    for turn in range(1, 4):
        cut(model, masks)
        fewer = next_masks(model, masks, 0.7**turn, scope, groups)  # type: ignore[arg-type]
        assert all(
            set(new) <= set(old)
            for new, old in zip(units_kept(fewer, groups).values(), units_kept(masks, groups).values(), strict=True)
        )
        masks = fewer
    kept = units_kept(masks, groups)
    assert all(len(units) >= 1 for units in kept.values()) and sum(map(len, kept.values())) < 0.5 * sum(
        g.units for g in groups
    )
    cut(model, masks)
    small, _ = apply(model, groups, without_units(groups, masks), images(3))  # compares the two
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    drawn = random_masks(model, masks, groups, 0)
    assert [len(u) for u in units_kept(drawn, groups).values()] == [len(u) for u in kept.values()]
    everyone = {group.name: np.arange(group.units) for group in groups}
    assert density(unit_masks(model, groups, everyone)) == 1.0


def test_networks_that_cannot_be_drawn_anew() -> None:
    made, other = fresh(vit(), 0), fresh(vit(), 1)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), fresh(vit(), 0).parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(made.parameters(), other.parameters(), strict=True))

    class Scaled(LeNet):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

    with pytest.raises(LodesetError, match="gain belong to no layer"):
        fresh(Scaled(), 0)


def test_a_loss_that_is_not_finite(gallery: Gallery) -> None:
    network = fresh(LeNet(), 0)
    task = make_task("labels", network, 5, 5, 0)
    with pytest.raises(LodesetError, match=r"labels: the loss is nan at step [0-9]+ of 30: lower lr"):
        begin(network, task, examples_of(gallery), Recipe(30, 1e30, 0.0, 0.0, 0), rewind=30)


@pytest.mark.parametrize("name", ["labels", "swav"])
def test_masks_learn_and_the_network_stays(name: TaskName, gallery: Gallery) -> None:
    network = fresh(Residual(), 0).eval()
    before = state_of(network)
    recipe = Recipe(steps=60, lr=50.0, weight_decay=0.0, warmup=0.25, seed=0)
    task = make_task(name, network, 4, 5, 0, prototypes=8, queue=32)
    first = loss_of(network, task, gallery)
    masks, loss = learn_masks(network, task, examples_of(gallery), recipe, head_lr=0.5)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert set(masks) == set(maskable(network)) and 0.3 < density(masks) < 1.0
    assert loss < {"labels": 0.8, "swav": 0.9}[name] * first
    made = masked_network(network, masks)
    for key, tensor in made.state_dict().items():
        if key in masks:
            share = float(masks[key].float().mean())
            torch.testing.assert_close(tensor, before[key] * masks[key] / share**0.5)
        else:
            assert torch.equal(tensor, before[key])
    with pytest.raises(LodesetError, match="masks are for"):
        masked_network(LeNet(), masks)


def test_the_gradient_of_a_score_is_that_of_its_mask() -> None:
    """d loss / d S = d loss / d (theta M / s) * theta / s with the scale s held."""
    from lodeset.pruning.learning.self_masking import _StraightThrough

    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([[1.0, -1.0, 0.5]] * 4, requires_grad=True)
    used = scaled(weight, _StraightThrough.apply(scores))  # type: ignore[no-untyped-call]
    gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    used.backward(gradient)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, gradient * weight / (2 / 3) ** 0.5)
    torch.testing.assert_close(used.detach(), weight * torch.tensor([1.0, 0.0, 1.0]) / (2 / 3) ** 0.5)
