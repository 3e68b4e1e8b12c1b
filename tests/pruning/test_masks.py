"""Masks: how many weights they keep and which, what they share, and how they lie on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import LeNet, Residual, shaken
from safetensors.torch import save_file

from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.learning.masks import (
    Masks,
    at_random,
    by_magnitude,
    cut,
    density,
    everything,
    load_masks,
    maskable,
    overlap,
    save_masks,
)


def kept(masks: Masks) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def test_norms_and_biases_are_not_maskable() -> None:
    model = Residual()
    assert set(maskable(model)) == {n for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_smallest_weights_go_round_by_round(scope: str) -> None:
    model = shaken(LeNet())
    weights = {name: weight.detach().abs() for name, weight in maskable(model).items()}
    masks = everything(model)
    for number in range(1, 5):
        fewer = by_magnitude(model, masks, 0.8**number, scope)  # type: ignore[arg-type]
        assert not any((fewer[name] & ~masks[name]).any() for name in masks)
        assert density(fewer) == pytest.approx(0.8**number, abs=0.01)
        parts = [weights] if scope == "global" else [{name: weight} for name, weight in weights.items()]
        for part in parts:
            smallest_kept = min(float(weight[fewer[name]].min()) for name, weight in part.items())
            gone = [weight[masks[name] & ~fewer[name]] for name, weight in part.items()]
            assert float(torch.cat(gone).max()) <= smallest_kept
        masks = fewer
    cut(model, masks)
    assert sum(int(torch.count_nonzero(w)) for w in maskable(model).values()) == sum(kept(masks))


def test_no_layer_loses_its_last_weight() -> None:
    model = shaken(LeNet())
    with torch.no_grad():
        model.get_submodule("fc2").weight.mul_(1e-9)  # type: ignore[operator, union-attr]
    found = by_magnitude(model, everything(model), 0.1, "global")
    assert int(found["fc2.weight"].sum()) == 1


def test_random_masks_keep_as_many_in_every_layer_and_nest() -> None:
    model = shaken(LeNet())
    some = by_magnitude(model, everything(model), 0.5, "global")
    fewer = by_magnitude(model, some, 0.25, "global")
    one, other, again = at_random(some, 0), at_random(fewer, 0), at_random(some, 1)
    assert kept(one) == kept(some) and kept(other) == kept(fewer)
    assert not any((other[name] & ~one[name]).any() for name in one)
    assert any((again[name] != one[name]).any() for name in one)


def test_overlap_against_sets() -> None:
    model = shaken(LeNet())
    masks = by_magnitude(model, everything(model), 0.4, "layer")
    drawn = [at_random(masks, seed) for seed in range(2)]
    sets = [{(n, int(i)) for n, mask in one.items() for i in mask.flatten().nonzero()} for one in drawn]
    found = overlap(*drawn)
    assert found.jaccard == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    # Drawn at random they share what chance gives: 5 deviations of so many weights.
    assert found.jaccard == pytest.approx(found.by_chance, abs=5 * 0.25 / np.sqrt(len(sets[0])))
    assert overlap(masks, masks).jaccard == 1.0


def test_a_bit_a_weight_on_disk(tmp_path: Path) -> None:
    masks = by_magnitude(shaken(LeNet()), everything(LeNet()), 0.7, "global")
    save_masks(tmp_path / "masks.safetensors", masks, "abc")
    back, of = load_masks(tmp_path / "masks.safetensors")
    assert of == "abc" and list(back) == list(masks)
    assert all(torch.equal(back[name], mask) and back[name].dtype == torch.bool for name, mask in masks.items())
    bits = sum(-(-mask.numel() // 8) for mask in masks.values())
    assert bits < (tmp_path / "masks.safetensors").stat().st_size < bits + 1500


def test_files_that_hold_no_masks(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    with pytest.raises(LodesetError, match="does not hold masks"):
        load_masks(path)
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(LodesetError, match="does not hold masks"):
        load_masks(path)
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, path, {"format": "another"})
    with pytest.raises(LodesetError, match="format is 'another'"):
        load_masks(path)
    told = {"format": "lodeset masks 1", "of": "", "shapes": '{"a": [100, 100]}'}
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, path, told)
    with pytest.raises(LodesetError, match="for 10000 weights"):
        load_masks(path)
