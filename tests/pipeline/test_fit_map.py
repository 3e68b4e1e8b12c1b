"""Where the map places images."""

from __future__ import annotations

import builtins
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.stages.inspect import fit_map


def groups(count: int, seed: int = 0, width: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around four directions, and which of these."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(1).normal(size=(4, width))
    where = rng.integers(0, 4, count)
    vectors = centers[where] + 0.3 * rng.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), where


def test_axes_of_few_dimensions_and_of_nothing() -> None:
    for sample in (np.zeros((0, 1)), np.zeros((5, 1)), np.ones((3, 2))):
        arrays = fit_map.by_principal_components(sample.astype(np.float32))
        assert arrays["axes"].shape == (2, sample.shape[1]) and np.isfinite(arrays["axes"]).all()


def test_axes_do_not_depend_on_the_order_of_images() -> None:
    sample, _ = groups(300)
    one, other = (fit_map.by_principal_components(s)["axes"] for s in (sample, sample[::-1].copy()))
    assert np.allclose(one, other, atol=1e-4)


def test_umap_keeps_groups_together_and_places_others_among_them() -> None:
    pytest.importorskip("umap", reason="umap-learn is an extra: pip install 'lodeset[umap]'")
    sample, where = groups(400)
    arrays = fit_map.by_umap(sample, 1)
    points = arrays["points"]
    assert points.shape == (400, 2) and np.quantile(np.abs(points), fit_map.WITHIN) <= 1.0001
    assert np.array_equal(points, fit_map.by_umap(sample, 1)["points"])  # seeded
    others, theirs = groups(200, seed=5)

    written = io.BytesIO()
    np.savez(written, **arrays)
    fitted: Any = SimpleNamespace(tables={"map": ("it",)})
    stored: Any = SimpleNamespace(opened=lambda file: io.BytesIO(written.getvalue()))
    width, place = fit_map.placing(stored, fitted, 1)
    assert width == sample.shape[1]
    assert np.abs(place(sample) - points).max() < 0.02, "an image of the sample lies where it was laid out"
    centers = np.stack([points[where == k].mean(axis=0) for k in range(4)])
    nearest = ((place(others)[:, None] - centers) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == theirs).mean() > 0.95


def test_without_umap_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "umap":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LodesetError, match=r"pip install 'lodeset\[umap\]'"):
        fit_map.by_umap(np.zeros((50, 4), np.float32), 1)
