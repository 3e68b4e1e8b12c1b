"""Sums over positions against loops."""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from lodeset.pruning.units.moments import Array, Gram


def gram_of(x: Array, y: Array) -> Gram:
    return Gram.from_activations(torch.from_numpy(x), torch.from_numpy(y))


def test_gram_equals_loops_and_adds_up() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(11, 3)), rng.normal(size=(11, 2))
    gram = gram_of(x[:4], y[:4]) + gram_of(x[4:], y[4:])
    assert gram.count == 11
    np.testing.assert_allclose(gram.xx, sum(np.outer(v, v) for v in x))
    np.testing.assert_allclose(gram.xy, sum(np.outer(v, u) for v, u in zip(x, y, strict=True)))
    np.testing.assert_allclose(gram.yy, sum(u * u for u in y))
    np.testing.assert_allclose(gram.sum_x, sum(x))
    np.testing.assert_allclose(gram.sum_y, sum(y))


def test_gram_survives_saving(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gram = gram_of(rng.normal(size=(11, 3)), rng.normal(size=(11, 2)))
    save_file(gram.arrays(), tmp_path / "gram.safetensors")
    again = Gram.from_arrays(load_file(tmp_path / "gram.safetensors"))
    assert again.count == 11
    for name, array in gram.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
