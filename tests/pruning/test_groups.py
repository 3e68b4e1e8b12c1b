"""What can be removed from networks of several kinds, and why the rest is left whole."""

import copy
import itertools

import numpy as np
import pytest
import torch
from networks import LeNet, Residual, images, replaced_at_random, shaken, vit
from torch import Tensor, nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.units.groups import find_groups, max_difference, outputs_of
from lodeset.pruning.units.removal import apply


def found(model: nn.Module) -> dict[str, tuple[int, dict[str, int]]]:
    """Units and readers with their columns, by group."""
    groups = find_groups(model, images(2)).prunable
    return {g.name: (g.units, {reader.name: len(reader.unit_of) for reader in g.readers}) for g in groups}


def test_a_plain_network_in_the_order_in_which_it_computes() -> None:
    model = shaken(LeNet())
    assert found(model) == {"conv1": (6, {"conv2": 54}), "conv2": (8, {"fc1": 32}), "fc1": (12, {"fc2": 12})}
    first, second, _ = find_groups(model, images(2)).prunable
    np.testing.assert_array_equal(first.readers[0].unit_of, np.repeat(np.arange(6), 9))  # the values under a kernel
    np.testing.assert_array_equal(second.readers[0].unit_of, np.repeat(np.arange(8), 4))  # flattened 2 x 2 maps
    assert "what the model returns" in find_groups(model, images(2)).skipped["fc2"]


def test_channels_of_a_residual_stream_are_one_group() -> None:
    groups = found(shaken(Residual()))
    assert list(groups.values()) == [
        (8, {"first.0": 72, "short.0": 8, "second.0": 72}),
        (12, {"first.3": 108}),
        (12, {"second.3": 108}),
        (10, {"head": 10}),
    ]
    assert next(iter(groups)) == "stem.0 + first.3"


@pytest.mark.parametrize("registers", [0, 2])
def test_a_vision_transformer_keeps_its_width(registers: int) -> None:
    groups = find_groups(vit(registers=registers), images(2))
    assert [(g.name, g.units, g.heads) for g in groups.prunable] == [
        ("blocks.0.attn", 2, "blocks.0.attn"),
        ("blocks.0.mlp.fc1", 64, None),
        ("blocks.1.attn", 2, "blocks.1.attn"),
        ("blocks.1.mlp.fc1", 64, None),
    ]
    (stream,) = (name for name in groups.skipped if "patch_embed.proj" in name)
    assert set(stream.split(" + ")) > {"blocks.0.attn.proj", "blocks.1.mlp.fc2"}
    assert "what the model returns" in groups.skipped[stream]


def test_a_gate_and_its_value_are_one_unit() -> None:
    groups = find_groups(vit("swiglu"), images(2)).prunable
    gated = next(group for group in groups if group.name == "blocks.0.mlp.w12")
    assert (gated.units, gated.readers[0].name) == (48, "blocks.0.mlp.w3")
    np.testing.assert_array_equal(gated.makers[0].unit_of, np.tile(np.arange(48), 2))


def test_a_model_of_another_library() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    groups = find_groups(shaken(transformers.Dinov2Model(config)), images(2))
    assert [(g.name, g.units) for g in groups.prunable] == [("encoder.layer.0.mlp.fc1", 64)]
    assert any("removing a unit breaks the model" in reason for reason in groups.skipped.values())


class Odd(nn.Module):
    """A LeNet-like network of which one part is `odd`."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.odd = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), odd
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(self.odd(torch.relu(self.first(x)))))
        out: Tensor = self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))
        return out


class Softmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * x.softmax(1)


class Doubled(nn.Module):
    """Twice the channels, the second half from elsewhere; and back."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.back = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.back(torch.cat([x, self.other(x)], dim=1))
        return out


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), "grouped convolution"),
        (nn.GroupNorm(2, 8), "normalizes over the units"),
        (Softmax(), "something else depends on it"),
        (Doubled(), "reads other layers' channels"),
    ],
)
def test_what_cannot_be_grouped_is_left_with_the_reason(odd: nn.Module, reason: str) -> None:
    groups = find_groups(shaken(Odd(odd)), images(2))
    assert [group.name for group in groups.prunable][-2:] == ["second", "fc1"]
    (told,) = [why for name, why in groups.skipped.items() if name.split(" + ")[0] == "first" or "first" in name]
    assert reason in told


@pytest.mark.parametrize("by_data", [False, True])
def test_layers_that_share_weights_are_left_with_the_reason(by_data: bool) -> None:
    widths = (768, 8, 8, 8, 8, 8, 4)
    layers = [nn.Linear(into, out) for into, out in itertools.pairwise(widths)]
    model = nn.Sequential(nn.Flatten(), *(one for layer in layers for one in (layer, nn.ReLU())))
    shaken(model)
    if by_data:
        layers[3].weight.data = layers[1].weight.data
    else:
        layers[3].weight = layers[1].weight
    groups = find_groups(model, images(2))  # 1, 3, 5, 7, 9, 11: 3 and 7 are tied
    assert [group.name for group in groups.prunable] == ["9"]
    told = {name: why for name, why in groups.skipped.items() if "shares" in why}
    assert told == {
        "1": "3 shares weights with 7",
        "3": "3 shares weights with 7",
        "5": "7 shares weights with 3",
        "7": "7 shares weights with 3",
    }


def test_a_model_with_nothing_to_prune_is_refused_with_the_reasons() -> None:
    with pytest.raises(LodesetError, match=r"nothing to prune.*: its width is that of what the model returns"):
        find_groups(nn.Conv2d(3, 4, 3), images(2))


def test_finding_leaves_the_model_as_it_was() -> None:
    model = vit().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_groups(model, images(2))
    assert model.training and not model.norm.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_small_outputs_hide_nothing() -> None:
    model = shaken(Odd(Softmax()))
    with torch.no_grad():
        model.fc2.weight.mul_(1e-7)
        model.fc2.bias.mul_(1e-7)
    assert [group.name for group in find_groups(model, images(2)).prunable] == ["second", "fc1"]


def test_frozen_weights_and_unused_layers() -> None:
    model = vit("swiglu").requires_grad_(False)
    model.spare = nn.ModuleDict({"w12": nn.Linear(4, 12), "w3": nn.Linear(6, 4)})
    groups = find_groups(model, images(2))
    assert len(groups.prunable) == 4
    assert "does not call it" in groups.skipped["spare.w3"]
    assert not any(
        name for name, parameter in model.named_parameters() if parameter.requires_grad and "spare" not in name
    )


def test_images_that_the_model_does_not_take() -> None:
    with pytest.raises(LodesetError, match="does not take images of 3 x 8 x 8 values"):
        find_groups(LeNet(), torch.randn(2, 3, 8, 8))


class Answers(nn.Module):
    def __init__(self, *answers: Tensor) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.answers


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([torch.ones(2, 1)], [torch.ones(2, 4)], float("inf")),
        ([torch.ones(2), torch.tensor([1.0, float("nan")])], [torch.ones(2), torch.ones(2)], float("inf")),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], float("inf")),
        ([torch.ones(2), torch.tensor([True])], [torch.ones(2), torch.tensor([True])], 0.0),
        ([torch.ones(2), torch.tensor([3])], [torch.ones(2), torch.tensor([4])], float("inf")),
        ([torch.tensor([1.0e-6, 0])], [torch.tensor([2.0e-6, 0])], 0.5),
        ([torch.zeros(2)], [torch.zeros(2)], 0.0),
    ],
)
def test_how_much_outputs_differ(one: list[Tensor], other: list[Tensor], expected: float) -> None:
    assert max_difference(Answers(*one), Answers(*other), images(2)) == pytest.approx(expected)


def test_outputs_of_every_kind() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    assert len(outputs_of({"a": one, "b": (two, None, [one])})) == 3
    assert len(outputs_of(vit()(images(2)))) == 2  # no registers: an empty tensor


def test_weights_whose_channels_come_last() -> None:
    """The memory format that convolutions are fastest in; a matrix of such a weight would be a copy of it."""
    for model in (LeNet(), Residual()):
        expected = find_groups(shaken(copy.deepcopy(model)), images(2))
        last = shaken(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = find_groups(last, images(2))
        assert [group.name for group in found.prunable] == [group.name for group in expected.prunable]
        pruned, _ = apply(last, found.prunable, replaced_at_random(last, found.prunable, 3), images(3))
        assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in last.parameters())
