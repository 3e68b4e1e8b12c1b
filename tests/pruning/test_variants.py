"""Groups pruned one after the other, each measured behind those before it."""

import numpy as np
import pytest
import torch
from networks import LeNet, images, shaken
from torch import Tensor, nn

from pruning.activations import collect_grams
from pruning.config import PruneJob
from pruning.groups import Group, find_groups, layer_of
from pruning.moments import Gram
from pruning.removal import apply
from pruning.variants import METHODS, Method, solved_at_once, solved_in_turn, variant_in_turn

EPS = 5e-2
JOB = PruneJob(sweep=(EPS,), mode="sequential")
BATCH = images(200)


def given_by(model: nn.Module, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = layer_of(model, name).register_forward_hook(lambda _m, _a, out: seen.append(out.double()))
    with torch.no_grad():
        model(BATCH)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_lost_is_what_the_pruned_model_gets_wrong(method: Method) -> None:
    """At every layer, behind all that was pruned before it: the share of the dense layer's variance."""
    model = shaken(LeNet())
    groups = find_groups(model, images(2)).prunable

    def measure(cut: nn.Module, group: Group) -> dict[str, Gram]:
        return collect_grams(cut, [group], BATCH.split(64), positions_per_image=None, seed=0, dense=model)

    solved, refused = solved_in_turn(model, groups, measure, JOB, EPS)
    assert not refused and sum(len(solved[group.name][EPS].support) for group in groups) < 6 + 8 + 12 - 3
    chosen = variant_in_turn(
        model, groups, measure, JOB, method, {name: by_eps[EPS] for name, by_eps in solved.items()}
    )
    pruned, _ = apply(model, groups, chosen.layers, images(2))
    expected, found = given_by(model, "fc2"), given_by(pruned, "fc2")
    lost = (found - expected).square().sum() / (expected - expected.mean(0)).square().sum()
    if method != "entropic":  # whose weights were solved for behind layers that are refitted
        assert chosen.unexplained["fc2"] == pytest.approx(lost.item(), rel=1e-3)
    if method == "entropic+refit":
        grams = collect_grams(model, groups, BATCH.split(64), positions_per_image=None, seed=0)
        at_once, _, _ = solved_at_once(groups, grams, JOB)
        np.testing.assert_array_equal(at_once["conv1"][EPS].support, solved["conv1"][EPS].support)
        assert at_once["fc1"][EPS].history[-1] != pytest.approx(solved["fc1"][EPS].history[-1], rel=1e-3)
