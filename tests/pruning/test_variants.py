"""Layers rewritten one after the other, each measured behind those before it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import LeNet, Residual, images, shaken, vit
from torch import Tensor, nn

from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.criteria import METHODS
from lodeset.pruning.choosing.in_turn import Measure, solved_in_turn, variant_in_turn
from lodeset.pruning.choosing.variants import Solutions, Variant, solved_at_once
from lodeset.pruning.config import PruneJob
from lodeset.pruning.jobs.sweep_parts import publish
from lodeset.pruning.units.activations import Behind, collect_behind, collect_grams, given, unfolded
from lodeset.pruning.units.folding import folded
from lodeset.pruning.units.groups import Group, find_groups, layer_of, taken_by
from lodeset.pruning.units.removal import apply, masked
from lodeset.training.vit import DinoVisionTransformer

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


def solved_and_measured(model: nn.Module) -> tuple[tuple[Group, ...], list[str], Measure, Solutions]:
    groups = find_groups(model, images(2)).prunable
    readers = {one.name for group in groups for one in group.readers}
    order = [name for name in taken_by(model, images(2)) if name in readers]

    def measure(cut: nn.Module, order: Sequence[str], names: Sequence[str]) -> dict[str, Behind]:
        return collect_behind(cut, model, order, names, BATCH.split(64), positions_per_image=None, seed=0)

    solved, refused = solved_in_turn(model, groups, order, measure, JOB, EPS)
    assert not refused
    return groups, order, measure, solved


@pytest.mark.parametrize("method", METHODS)
def test_what_is_lost_is_what_the_pruned_model_gets_wrong(method: str) -> None:
    """At every layer, behind all that was pruned before it: the share of the dense layer's variance."""
    model = shaken(LeNet())
    groups, order, measure, solved = solved_and_measured(model)
    assert sum(len(solved[group.name][EPS].support) for group in groups) < 6 + 8 + 12 - 3
    at = {name: by_eps[EPS] for name, by_eps in solved.items()}
    chosen = variant_in_turn(model, groups, order, measure, JOB, method, at)
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


class InPlace(nn.Module):
    """Two residual blocks, as they are often written: what layers give is overwritten, the second is scaled."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.in_place = in_place
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.into = nn.ModuleList(nn.Conv2d(8, 12, 3, padding=1) for _ in range(2))
        self.out = nn.ModuleList(nn.Conv2d(12, 8, 3, padding=1) for _ in range(2))
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.1)
        self.head = nn.Linear(8, 4)

    def sums(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.stem(x), inplace=self.in_place)
        found = []
        for number, (into, out) in enumerate(zip(self.into, self.out, strict=True)):
            y = out(F.relu(into(x), inplace=self.in_place))
            if number == 1:
                y = y.mul_(self.scale) if self.in_place else self.scale * y
            if self.in_place:
                y += x
            else:
                y = x + F.dropout(y, training=False)
            found.append(y.clone())
            x = F.relu(y, inplace=self.in_place)
        return [*found, x]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.sums(x)[-1].mean((2, 3)))
        return out


def in_turn(model: nn.Module, whole: str = "") -> tuple[nn.Module, Variant]:
    """The model with zeros where units are gone, at full size, one group left whole; and what became of the groups."""
    groups, order, measure, solved = solved_and_measured(model)
    at = {name: by_eps[EPS] for name, by_eps in solved.items() if name != whole}
    done = variant_in_turn(model, groups, order, measure, JOB, "entropic+refit", at)
    assert any(len(done.layers[group.name].keep) < group.units for group in groups)
    assert set(done.unexplained) == set(order)
    return masked(model, done.layers), done


def sums_of_a_transformer(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What is in the residual stream behind every branch."""
    assert isinstance(model, DinoVisionTransformer)
    found: dict[str, Tensor] = {}
    handles = []
    for number, block in enumerate(model.blocks):
        for name, of in (("attn.proj", block.norm2), ("mlp.fc2", [*model.blocks, model][number + 1])):
            norm = of if name == "attn.proj" else of.norm1 if number + 1 < len(model.blocks) else model.norm

            def note(_m: nn.Module, args: tuple[Tensor, ...], name: str = f"blocks.{number}.{name}") -> None:
                found[name] = args[0].clone()

            handles.append(norm.register_forward_pre_hook(note))
    model(x)
    for handle in handles:
        handle.remove()
    return found


def sums_in_place(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    assert isinstance(model, InPlace)
    return {f"out.{number}": one for number, one in enumerate(model.sums(x)[:2])}


def sums_of_residual(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    assert isinstance(model, Residual)
    x = torch.relu(model.stem(x))
    first = x + model.first(x)
    x = torch.relu(first)
    return {"first.3": first, "second.3": model.short(x) + model.second(x)}


@pytest.mark.parametrize(
    ("network", "sums", "whole"),
    [
        (lambda: shaken(InPlace()), sums_in_place, ""),
        (lambda: shaken(InPlace()), sums_in_place, "into.1"),
        (lambda: folded(shaken(Residual()), images(2)), sums_of_residual, ""),
        (vit, sums_of_a_transformer, ""),
    ],
)
def test_in_the_finished_model_no_layer_could_do_better(
    network: Callable[[], nn.Module], sums: Callable[[nn.Module, Tensor], dict[str, Tensor]], whole: str
) -> None:
    """What its sum, or else its output, gets wrong has nothing to do with what it takes: the normal equations of all layers at once."""
    torch.manual_seed(0)
    model = network()
    cut, done = in_turn(model, whole)
    with torch.no_grad():
        found, expected = sums(cut, BATCH), sums(model, BATCH)
    looked_at = []
    for replacement in done.layers.values():
        for name, new in replacement.readers.items():
            layer, taken = layer_of(cut, name), []
            handle = layer.register_forward_pre_hook(lambda _m, args, taken=taken: taken.append(args[0].clone()))
            with torch.no_grad():
                cut(BATCH)
            handle.remove()
            x = unfolded(layer, taken[0]).double()[:, torch.from_numpy(np.flatnonzero(new.weight.any(axis=0)))]
            wrong = (
                (found[name] - expected[name]).double()
                if name in found
                else given_by(cut, name) - given_by(model, name)
            )
            error = given(layer, wrong)
            if error.square().mean() < 1e-9:  # nothing before it is pruned
                continue
            looked_at.append(name)
            x, error = x - x.mean(0), error - error.mean(0)
            correlation = (x.T @ error) / torch.outer(x.norm(dim=0), error.norm(dim=0))
            assert correlation.abs().max() < 5e-3, name
    assert len(set(looked_at) & found.keys()) >= 2 and len(looked_at) >= 3


def test_what_is_written_into_outputs_changes_nothing() -> None:
    torch.manual_seed(0)
    in_place, plain = shaken(InPlace()), shaken(InPlace(in_place=False))
    plain.load_state_dict(in_place.state_dict())
    one, other = in_turn(in_place)[0], in_turn(plain)[0]
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)


def test_what_a_layer_loses_is_told_of_its_sum() -> None:
    torch.manual_seed(0)
    model = shaken(InPlace())
    assert isinstance(model, InPlace)
    cut, done = in_turn(model)
    with torch.no_grad():
        wrong = (sums_in_place(cut, BATCH)["out.1"] - sums_in_place(model, BATCH)["out.1"]) / model.scale
    expected = given_by(model, "out.1").transpose(0, 1).flatten(1)
    lost = wrong.double().square().sum() / (expected - expected.mean(1, keepdim=True)).square().sum()
    assert done.unexplained["out.1"] == pytest.approx(lost.item(), rel=1e-3)


class Fickle(nn.Module):
    """Calls a layer again where the images ask for it; gains of 0 where they do not matter."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again, self.calls = again, 0
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gain * self.conv2(torch.relu(self.conv1(x)))
        return torch.relu(self.conv1(x)).mean((2, 3)) if self.again else x.mean((2, 3))


def test_models_that_call_layers_differently_are_refused() -> None:
    dense, cut = Fickle(True), Fickle(False)
    with pytest.raises(LodesetError, match="conv1: called 2 times in the dense model and 1 times in the pruned one"):
        collect_behind(cut, dense, ["conv1"], ["conv1"], [images(4)], positions_per_image=None, seed=0)
    with pytest.raises(LodesetError, match="no calibration images"):
        collect_behind(cut, cut, ["conv1"], ["conv1"], [], positions_per_image=None, seed=0)


def test_what_a_gain_of_0_hides_is_not_made_up_for() -> None:
    dense, cut = Fickle(False), Fickle(False)
    with torch.no_grad():
        cut.conv1.weight.add_(1.0)
    (found,) = collect_behind(
        cut, dense, ["conv1", "conv2"], ["conv2"], [images(8)], positions_per_image=None, seed=0
    ).values()
    np.testing.assert_allclose(found.needed.sum_y, found.dense.sum_y)  # the stream is the images themselves
    with torch.no_grad():
        moved = collect_behind(
            Moved(dense),
            Moved(dense, 0.5),
            ["of.conv1", "of.conv2"],
            ["of.conv2"],
            [images(8)],
            positions_per_image=None,
            seed=0,
        )["of.conv2"]
    lost = (moved.needed.sum_y - moved.dense.sum_y) / moved.dense.count
    np.testing.assert_allclose(lost, [0.0, 0.5, 0.25], atol=1e-6)


class Moved(nn.Module):
    def __init__(self, of: nn.Module, by: float = 0.0) -> None:
        super().__init__()
        self.of, self.by = of, by

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.of(x + self.by)
        return out


def test_a_group_that_cannot_be_refitted_in_a_later_turn_stays_whole() -> None:
    """The second layer that reads it sees infinities once the first is rewritten."""
    torch.manual_seed(0)
    model = shaken(InPlace())
    groups = find_groups(model, images(2)).prunable
    order = [name for name in taken_by(model, images(2)) if any(name == r.name for g in groups for r in g.readers)]
    several = next(group for group in groups if len(group.readers) > 1)

    def measure(cut: nn.Module, order: Sequence[str], names: Sequence[str]) -> dict[str, Behind]:
        found = collect_behind(cut, model, order, names, [BATCH], positions_per_image=None, seed=0)
        last = [name for name in order if name in {reader.name for reader in several.readers}][-1]
        if names == [last]:
            broken = replace(found[last].needed, sum_y=np.full_like(found[last].needed.sum_y, np.inf))
            found[last] = replace(found[last], needed=broken)
        return found

    solved, refused = solved_in_turn(model, groups, order, measure, JOB, EPS)
    assert set(refused) == {several.name} and "infinities" in refused[several.name]
    assert set(solved) == {group.name for group in groups} - {several.name}


def test_a_folder_that_no_manifest_lists_is_made_again_unless_it_is_the_same(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model").write_bytes(b"weights")

    first = publish(store, "pruned/a", write)
    assert publish(store, "pruned/a", write) == first
    (tmp_path / "pruned/a/model").write_bytes(b"weighty")  # a bit that flipped, after the manifest was lost
    (tmp_path / "pruned/a/more").touch()
    assert publish(store, "pruned/a", write) == first
    assert [p.name for p in (tmp_path / "pruned").iterdir()] == ["a"]
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "pruned/a").iterdir()] == [("model", b"weights")]
