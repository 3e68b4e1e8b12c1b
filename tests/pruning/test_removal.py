"""Removing units, and models that come back from disk."""

import json
from pathlib import Path

import pytest
import torch
from networks import LeNet, Residual, images, replaced_at_random, shaken, vit
from torch import nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.formats.saving import load_model, save_pruned
from lodeset.pruning.units.groups import find_groups, layer_of, max_difference
from lodeset.pruning.units.removal import Replacement, Weights, apply, masked

MODELS = {
    "lenet": lambda: shaken(LeNet()),
    "residual": lambda: shaken(Residual()),
    "vit": vit,
    "registers": lambda: vit(registers=2, heads=4),
    "swiglu": lambda: vit("swiglu", heads=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_units_are_really_gone_and_nothing_else_is(name: str) -> None:
    model = MODELS[name]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = find_groups(model, images(2)).prunable
    new = replaced_at_random(model, groups, 3)
    pruned, difference = apply(model, groups, new, images(4))
    assert difference <= 1e-4
    assert [g.units for g in find_groups(pruned, images(2)).prunable] == [
        len(new[g.name].keep) for g in groups if len(new[g.name].keep) > 1
    ]
    assert max_difference(pruned, masked(model, new), images(4, seed=7)) <= 1e-4
    assert max_difference(pruned, model, images(4)) > 1e-2
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    for group in groups:
        for reader in group.readers:
            assert layer_of(pruned, reader.name).bias is not None


def test_keeping_everything_changes_nothing() -> None:
    model = vit()
    groups = find_groups(model, images(2)).prunable
    new = {}
    for group in groups:
        readers = {}
        for reader in group.readers:
            layer = layer_of(model, reader.name)
            assert layer.bias is not None
            readers[reader.name] = Weights(*(p.detach().double().numpy() for p in (layer.weight, layer.bias)))
        new[group.name] = Replacement(torch.arange(group.units).numpy(), readers)
    assert max_difference(apply(model, groups, new, images(2))[0], model, images(4)) == 0.0


def test_a_unit_that_something_else_reads_is_noticed() -> None:
    """A model that changed since its groups were found: softmax makes every unit depend on all others."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 8), nn.Identity(), nn.Linear(8, 4))
    groups = find_groups(model, images(2)).prunable
    model[2] = nn.Softmax(-1)
    with pytest.raises(LodesetError, match="differ by"):
        apply(model, groups, replaced_at_random(model, groups, 4), images(4))


def test_saved_models_come_back_equal(tmp_path: Path) -> None:
    for number, model in enumerate((vit(registers=2, heads=4), vit("swiglu"), shaken(LeNet()))):
        groups = find_groups(model, images(2)).prunable
        pruned, _ = apply(model, groups, replaced_at_random(model, groups, 3), images(2))
        save_pruned(pruned, tmp_path / str(number), images(2))
        again = load_model(tmp_path / str(number))
        assert max_difference(again, pruned, images(4)) == 0.0
        assert not again.training


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model = vit()
    with pytest.raises(LodesetError, match="holds no model"):
        load_model(tmp_path)
    save_pruned(model, tmp_path, images(2))
    told = json.loads((tmp_path / "architecture.json").read_text())

    def described(**changes: object) -> None:
        (tmp_path / "architecture.json").write_text(json.dumps(told | changes))

    described(model=told["model"] | {"dim": 8})
    with pytest.raises(LodesetError, match="wider than"):
        load_model(tmp_path)
    for heads in ({"blocks.0.attn": 0}, {"blocks.0.attn": 3}, {"blocks.0.attn": "2"}, {"blocks.0": 1}, {"nowhere": 1}):
        described(heads=heads)
        with pytest.raises(LodesetError, match="does not hold a model"):
            load_model(tmp_path)
    described()
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(LodesetError, match="does not hold a model"):
        load_model(tmp_path)
