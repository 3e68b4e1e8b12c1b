"""Models that come back without the code that defined them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import LeNet, Residual, images, replaced_at_random, shaken
from torch import Tensor, nn

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.formats.portable import GRAPH, load_portable, save_portable
from lodeset.pruning.units.groups import find_groups, max_difference
from lodeset.pruning.units.removal import apply


class Sequence(nn.Module):
    """Parameters of its own, slices, methods and tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 4, 6))
        self.stem, self.norm = nn.Conv2d(3, 6, 8, 8), nn.Sequential(nn.LayerNorm(6), nn.GELU())

    def forward(self, x: Tensor) -> dict[str, Any]:
        tokens = self.norm(self.stem(x).flatten(2).transpose(1, 2) + self.position)
        mixed = torch.cat([tokens[:, 1:, ...], tokens], dim=1).mean(1)
        return {"first": tokens[:, 0] ** 2, "rest": (mixed, tokens.flip(1).view(x.shape[0], -1))}


@pytest.mark.parametrize("kind", [LeNet, Residual])
def test_a_pruned_model_comes_back_without_its_class(kind: type[nn.Module], tmp_path: Path) -> None:
    model = shaken(kind())
    groups = find_groups(model, images(2)).prunable
    pruned, _ = apply(model, groups, replaced_at_random(model, groups, 3), images(2))
    save_portable(pruned, tmp_path / "model", images(2))
    again = load_portable(tmp_path / "model")
    assert max_difference(again, pruned, images(4)) == 0.0
    assert not again.training
    assert again.state_dict().keys() == pruned.state_dict().keys()
    # What came back is a model like any other: it can be pruned again, and stored.
    save_portable(apply(again, *pruned_again(again), images(2))[0], tmp_path / "again", images(2))
    load_portable(tmp_path / "again")


def pruned_again(model: nn.Module) -> Any:
    groups = find_groups(model, images(2)).prunable
    return groups, replaced_at_random(model, groups, 2)


def test_parameters_slices_shapes_and_several_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Sequence().train()
    save_portable(model, tmp_path, images(2))
    assert model.training
    assert max_difference(load_portable(tmp_path), model.eval(), images(3)) == 0.0


class Strange(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.LSTM(3, 3) if kind == "layer" else nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3), persistent=False)
        if kind == "hook":
            self.layer.register_forward_hook(lambda _m, _a, out: 2 * out)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "branch" and x.sum() > 0:
            return x
        if self.kind == "function":
            return torch.fft.fft(x)
        if self.kind == "buffer":
            return self.layer(x) * self.scale
        return x.exp() if self.kind == "method" else self.layer(x)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("layer", "layer is a LSTM"),
        ("branch", "cannot be traced"),
        ("function", "calls .*fft"),
        ("method", "method exp"),
        ("hook", "returns something else"),
        ("buffer", "does not run"),
    ],
)
def test_what_a_file_cannot_tell_is_refused(kind: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(LodesetError, match=told):
        save_portable(Strange(kind), tmp_path, torch.ones(2, 3))


def test_files_of_strangers_run_nothing(tmp_path: Path) -> None:
    save_portable(shaken(LeNet()), tmp_path, images(2))
    good = (tmp_path / GRAPH).read_text()

    def refused(change: Any) -> None:
        tree = json.loads(good)
        change(tree)
        (tmp_path / GRAPH).write_text(json.dumps(tree))
        with pytest.raises(LodesetError, match="does not hold a model"):
            load_portable(tmp_path)

    call = next(i for i, node in enumerate(json.loads(good)["nodes"]) if node["op"] == "call_function")
    refused(lambda t: t["nodes"][call].update(target="os.system"))
    refused(lambda t: t["nodes"][call].update(op="call_method", target="__class__"))
    refused(lambda t: t["nodes"][call].update(op="call_module", target="conv1; import os"))
    refused(lambda t: t["nodes"][call].update(op="eval"))
    refused(lambda t: t["nodes"][call].update(name="x = __import__('os')"))
    refused(lambda t: t["nodes"][call].update(kwargs={"a, b": 1}))
    refused(lambda t: t["nodes"][call].update(args={"tuple": [{"node": "nowhere"}]}))
    refused(lambda t: t["nodes"][0].update(target="x=print(1)"))
    refused(lambda t: t["layers"]["conv1"].update(layer="Module"))
    refused(lambda t: t["layers"]["conv1"].update(nowhere=1))
    refused(lambda t: t["layers"]["conv1"].update(device="meta"))
    refused(lambda t: t["layers"].update(huge={"layer": "Linear", "in_features": 10**9, "out_features": 10**9}))
    refused(lambda t: t["layers"]["fc1"].update(out_features=10**12))
    refused(lambda t: t["nodes"][call].update(kwargs={"if": 1}))
    refused(lambda t: t["nodes"][call].update(args={"tuple": []}, op="call_method", target="view"))
    refused(lambda t: t["nodes"][0].update(name="lambda", target="lambda"))
    refused(lambda t: t["layers"]["conv1"].update(in_channels=7))
    refused(lambda t: t["layers"].update({"a..b": t["layers"]["conv1"]}))
    refused(lambda t: t.pop("nodes"))
    (tmp_path / GRAPH).write_text(good)
    load_portable(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(LodesetError, match="does not hold a model"):
        load_portable(tmp_path)
