"""Moments of layers against activations taken by hand."""

import numpy as np
import pytest
import torch
from networks import Residual, images, shaken, vit
from torch import nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.units.activations import collect_grams, sample_positions
from lodeset.pruning.units.groups import find_groups
from lodeset.pruning.units.moments import Gram


def assert_same(one: Gram, other: Gram) -> None:
    for name, array in one.arrays().items():
        np.testing.assert_allclose(array, other.arrays()[name], rtol=1e-4, atol=1e-3, err_msg=name)


def test_a_linear_layer_of_a_transformer() -> None:
    """x is gelu(fc1(.)) of all tokens, y is fc2's output with its bias, also when batches are split."""
    model = vit(registers=2)
    batch, groups = images(6), find_groups(model, images(2)).prunable
    grams = collect_grams(model, groups, [batch[:4], batch[4:]], positions_per_image=None, seed=0)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule("blocks.1.norm2").register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(batch)
    handle.remove()
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        x = nn.functional.gelu(mlp.fc1(seen[0]))
        expected = Gram.from_activations(x, mlp.fc2(x))
    assert expected.count == 6 * (1 + 2 + 16)
    assert_same(grams["blocks.1.mlp.fc2"], expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_convolution_is_the_linear_layer_of_what_lies_under_its_kernel(mode: str) -> None:
    model = shaken(Residual())
    second = model.get_submodule("second")
    assert isinstance(second, nn.Sequential)
    second[0] = nn.Conv2d(8, 12, 3, 2, 1, padding_mode=mode)
    groups = find_groups(model, images(2)).prunable
    gram = collect_grams(model, groups, [images(5)], positions_per_image=None, seed=0)["second.0"]
    weight, bias = (
        tensor.detach().double().flatten(1 if tensor.dim() > 1 else 0).numpy() for tensor in second[0].parameters()
    )
    assert gram.count == 5 * 8 * 8
    # y = W x + b at every position, so the sums of y follow from those of x.
    np.testing.assert_allclose(gram.sum_y, weight @ gram.sum_x + gram.count * bias, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(gram.xy.T, weight @ gram.xx + np.outer(bias, gram.sum_x), rtol=1e-4, atol=1e-2)


def test_drawn_positions_do_not_depend_on_batches_or_workers() -> None:
    for model in (vit(), shaken(Residual())):
        groups, batch = find_groups(model, images(2)).prunable, images(8)
        whole = collect_grams(model, groups, [batch], positions_per_image=5, seed=1)
        first = collect_grams(model, groups, [batch[:2], batch[2:3]], positions_per_image=5, seed=1)
        second = collect_grams(model, groups, [batch[3:]], positions_per_image=5, seed=1, first_image=3)
        other = collect_grams(model, groups, [batch], positions_per_image=5, seed=2)
        for name, gram in whole.items():
            assert gram.count == (8 if name == "head" else 40)
            assert_same(first[name] + second[name], gram)
            assert name == "head" or not np.allclose(other[name].xx, gram.xx, rtol=1e-4, atol=1e-3)


class Twice(nn.Module):
    """A layer that sees two views of each image, a layer called by keyword, and one that sees no image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.place1, self.place2 = nn.Linear(2, 8), nn.Linear(8, 4)
        self.register_buffer("places", torch.randn(5, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, 3 * x.flip(-1)])
        x = self.conv2(torch.relu(self.conv1(x))).mean((2, 3))
        x = x[: len(x) // 2] + x[len(x) // 2 :]
        places = self.place2(torch.relu(self.place1(self.places))).mean(0)
        out: torch.Tensor = self.fc2(input=torch.relu(self.fc1(x))) + places
        return out


def test_every_call_and_every_view_is_measured() -> None:
    model = shaken(Twice())
    groups = find_groups(model, images(2))
    assert [group.name for group in groups.prunable] == ["conv1", "fc1"]
    assert "does not grow with the number of images" in groups.skipped["place1"]
    grams = collect_grams(model, groups.prunable, [images(4)], positions_per_image=None, seed=0)
    assert (grams["conv2"].count, grams["fc2"].count) == (2 * 4 * 12 * 12, 4)
    halves = [torch.relu(model.get_submodule("conv1")(view)) for view in (images(4), 3 * images(4).flip(-1))]
    expected = sum(torch.nn.functional.unfold(half, 3).double().sum((0, 2)) for half in halves)
    np.testing.assert_allclose(grams["conv2"].sum_x, expected.detach().numpy(), rtol=1e-5)


def test_drawn_positions_are_distinct_and_reach_every_token() -> None:
    drawn = [sample_positions(image, 17, 5, seed=0) for image in range(50)]
    assert all(len(set(d)) == 5 and list(d) == sorted(d) for d in drawn)
    assert set(np.concatenate(drawn)) == set(range(17))
    np.testing.assert_array_equal(sample_positions(0, 17, 40, seed=0), np.arange(17))


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = vit()
    groups = find_groups(model, images(2)).prunable
    model.train()
    model.norm.eval()
    collect_grams(model, groups, [images(2)], positions_per_image=None, seed=0)
    assert model.training
    assert not model.norm.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_images_is_an_error() -> None:
    with pytest.raises(LodesetError, match="no calibration images"):
        collect_grams(vit(), find_groups(vit(), images(2)).prunable, [], positions_per_image=None, seed=0)
