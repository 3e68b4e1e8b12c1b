"""kNN against a loop; features against the model fed by hand."""

import math

import numpy as np
import pytest
import torch

from lodeset.pipeline.errors import LodesetError
from lodeset.training.config import ModelConfig
from lodeset.training.evaluate import features, knn, knn_accuracy
from lodeset.training.metrics import effective_rank
from lodeset.training.vit import DinoVisionTransformer


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.standard_normal((rows, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def test_knn_equals_a_loop_over_queries() -> None:
    rng = np.random.default_rng(0)
    gallery, queries, labels = unit(rng, 30), unit(rng, 1100), rng.choice(["a", "b", "c"], 30)
    for k in (1, 5, 30):
        expected = []
        for query in queries:
            cosines = [float(row @ query) for row in gallery]
            votes: dict[str, float] = {}
            for i in sorted(range(30), key=lambda i: -cosines[i])[:k]:
                votes[labels[i]] = votes.get(labels[i], 0.0) + math.exp(cosines[i] / 0.07)
            expected.append(max(votes, key=lambda label: votes[label]))
        assert (knn(gallery, labels, queries, k) == np.array(expected)).all()
        assert knn_accuracy(gallery, labels, queries, expected, k) == 1


def test_weights_let_one_close_neighbour_outvote_two_far_ones() -> None:
    gallery = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8]], np.float32)
    query = np.array([[1, 0]], np.float32)
    assert knn(gallery, ["near", "far", "far"], query, 3, 0.07).tolist() == ["near"]
    assert knn(gallery, ["near", "far", "far"], query, 3, 100.0).tolist() == ["far"]


def test_too_many_neighbours_are_refused() -> None:
    with pytest.raises(LodesetError, match="k = 4 neighbors of 3"):
        knn(np.eye(3, dtype=np.float32), ["a", "b", "c"], np.eye(3, dtype=np.float32), 4)


def test_features_are_those_of_the_centre_square_whatever_the_batch() -> None:
    torch.manual_seed(0)
    model = DinoVisionTransformer(ModelConfig(dim=16, depth=1, heads=2), 32).train()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32 + 8 * i, 3), dtype=np.uint8) for i in range(5)]
    found = features(model, images, 32, batch=2)
    assert found.shape == (5, 16) and model.training
    np.testing.assert_allclose(found, features(model, images, 32, batch=5), atol=1e-6)
    square = images[2][:, 8:40].astype(np.float32) / 255
    square = (square - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        cls = model.eval()(torch.from_numpy(square.transpose(2, 0, 1)).float()[None]).cls[0].numpy()
    np.testing.assert_allclose(found[2], cls / np.linalg.norm(cls), atol=1e-5)
    with pytest.raises(LodesetError, match="size 30 is not a multiple of patch size 8: use 24"):
        features(model, images, 30, batch=2)


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1, abs=1e-3)
