"""Classifiers on small ONNX files whose output is known: the channel means of the image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import pixels
from onnx_files import write_means
from PIL import Image

from lodeset.pipeline.embedders.preprocess import Recipe, normalised
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.filters.classifiers import classifier
from lodeset.pipeline.filters.config import Classifier
from lodeset.pipeline.filters.models import classifier_identity

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def config(path: Path, **knobs: Any) -> Classifier:
    given = {"name": "red", "path": str(path), "size": 16, "keep": "below", "threshold": 0.5, **PLAIN, **knobs}
    return Classifier.model_validate(given)


def inputs(one: Classifier, count: int = 5) -> list[np.ndarray]:
    recipe = Recipe("square", one.size or 16, one.size or 16, (0, 0, 0), (1, 1, 1))
    return [normalised(Image.fromarray(pixels(n)), recipe) for n in range(count)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_means(tmp_path / "means.onnx", 16)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_score_is_one_number_of_the_network(model: Path, index: int) -> None:
    one = config(model, index=index)
    expected = [given[index].mean() for given in inputs(one)]
    np.testing.assert_allclose(classifier(one, 1).scores(inputs(one)), expected, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_batches_change_nothing(model: Path, batch: int) -> None:
    one = config(model, index=1, batch=batch)
    whole = classifier(config(model, index=1), 1).scores(inputs(one))
    np.testing.assert_allclose(classifier(one, 1).scores(inputs(one)), whole, atol=1e-6)
    assert classifier(one, 1).scores([]).shape == (0,)


def test_activations(model: Path) -> None:
    means = np.stack([given.mean(axis=(1, 2)) for given in inputs(config(model))])
    soft = classifier(config(model, index=2, activation="softmax"), 1).scores(inputs(config(model)))
    np.testing.assert_allclose(soft, np.exp(means[:, 2]) / np.exp(means).sum(axis=1), atol=1e-5)
    sigmoid = classifier(config(model, index=0, activation="sigmoid"), 1).scores(inputs(config(model)))
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-means[:, 0])), atol=1e-5)


def test_one_number_an_image_needs_no_index(tmp_path: Path) -> None:
    one = config(write_means(tmp_path / "one.onnx", 16, then=["ReduceMean"]))
    np.testing.assert_allclose(classifier(one, 1).scores(inputs(one)), [x.mean() for x in inputs(one)], atol=1e-5)


def test_an_output_is_chosen_by_name(tmp_path: Path) -> None:
    path = write_means(tmp_path / "two.onnx", 16, outputs=2)
    plain, negated = (
        classifier(config(path, index=0, output=name), 1).scores(inputs(config(path))) for name in ("scores", "negated")
    )
    np.testing.assert_allclose(plain, -negated)


@pytest.mark.parametrize(
    ("written", "knobs", "told"),
    [
        ({}, {}, r"gives 3 numbers for each image: say which is the score with `index`"),
        ({}, {"index": 3}, r"gives 3 numbers for each image, and has no index 3"),
        ({}, {"index": 0, "output": "logits"}, r"has no output logits; there are: scores"),
        ({"outputs": 2}, {"index": 0}, r"has the outputs scores, negated: say which with `output`"),
        ({}, {"index": 0, "size": 24}, r"only takes images of 16 x 16 .*remove `filter\.classifiers \(red\): size:`"),
        ({"then": ["Neg", "Sqrt"]}, {"index": 0}, r"gives the score nan, which cannot be compared"),
        (
            {"then": ["ReduceMean"]},
            {"activation": "softmax"},
            r"gives one number for each image, whose softmax is always 1: use sigmoid",
        ),
    ],
)
def test_models_that_do_not_fit_are_named(
    tmp_path: Path, written: dict[str, Any], knobs: dict[str, Any], told: str
) -> None:
    one = config(write_means(tmp_path / "bad.onnx", 16, **written), **knobs)
    with pytest.raises(LodesetError, match=rf"classifier red \(.*bad\.onnx\) {told}"):
        classifier(one, 1).scores(inputs(one))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    missing = config(tmp_path / "none.onnx")
    for ask in (classifier_identity, lambda one: classifier(one, 1)):
        with pytest.raises(LodesetError, match=r"no model.*check `filter\.classifiers \(red\): path:`"):
            ask(missing)
    (tmp_path / "none.onnx").write_bytes(b"no model")
    with pytest.raises(LodesetError, match="not an ONNX model"):
        classifier(missing, 1)


def test_identity_is_what_scores_depend_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "moved.onnx").write_bytes(model.read_bytes())
    same = config(tmp_path / "moved.onnx", index=0, keep="above", threshold=0.9, batch=2)
    assert classifier_identity(same) == classifier_identity(config(model, index=0))
    others = [
        {"index": 1},
        {"index": 0, "size": 24},
        {"index": 0, "activation": "sigmoid"},
        {"index": 0, "mean": (1, 0, 0)},
    ]
    for knobs in others:
        assert classifier_identity(config(model, **knobs)) != classifier_identity(same)
    write_means(tmp_path / "moved.onnx", 16, then=["Neg"])
    assert classifier_identity(same) != classifier_identity(config(model, index=0))
