"""What an ONNX file says of its input decides how pixels go in: checked on networks that give the means of the channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import pixels
from onnx_files import DOUBLE, FLOAT, FLOAT16, INT64, UINT8, write_detector, write_means
from PIL import Image

from lodeset.pipeline.embedders.config import OnnxEmbedder
from lodeset.pipeline.embedders.models import identity
from lodeset.pipeline.embedders.onnx import onnx
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.filters.classifiers import classifier
from lodeset.pipeline.filters.config import Classifier, Faces
from lodeset.pipeline.filters.faces import detector

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def images(count: int) -> list[Image.Image]:
    return [Image.fromarray(pixels(n, width=40, height=30)) for n in range(count)]


def of(path: Path, **knobs: Any) -> OnnxEmbedder:
    return OnnxEmbedder.model_validate({"kind": "onnx", "path": str(path), **knobs})


def squares(count: int, side: int = 16) -> np.ndarray:
    """The means of the channels of images resized to a square, 0..1."""
    settings: dict[str, Any] = {"resample": Image.Resampling.BICUBIC, "reducing_gap": 2.0}
    return np.stack([np.asarray(i.resize((side, side), **settings)).mean(axis=(0, 1)) / 255 for i in images(count)])


def expected(count: int, side: int = 16) -> np.ndarray:
    return (squares(count, side) - MEAN) / STD


@pytest.mark.parametrize("fixed", [1, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 4, 10])
def test_a_fixed_batch_is_filled_up(tmp_path: Path, fixed: int, count: int) -> None:
    embed = onnx(of(write_means(tmp_path / "m.onnx", 16, batch=fixed)), 1)
    np.testing.assert_allclose(embed(images(count)), expected(count), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_for_one_image_that_says_it_takes_any_number(tmp_path: Path, batch: int) -> None:
    """Exported without dynamic axes and relabelled: a constant of its shapes holds the batch."""
    path = write_means(tmp_path / "m.onnx", 16, for_one=True)
    np.testing.assert_allclose(onnx(of(path, batch=batch), 1)(images(5)), expected(5), atol=1e-5)
    scorer = classifier(Classifier(name="red", path=str(path), index=0, keep="below", threshold=0), 1)
    scores = scorer.scores([scorer.prepare(image) for image in images(5)])
    np.testing.assert_allclose(scores, expected(5)[:, 0], atol=1e-5)


@pytest.mark.parametrize("element", [FLOAT, FLOAT16, DOUBLE, UINT8])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", ["B", 2])
def test_layouts_and_types(tmp_path: Path, element: int, channels_last: bool, batch: int | str) -> None:
    path = write_means(tmp_path / "m.onnx", 16, batch=batch, element=element, channels_last=channels_last)
    found = onnx(of(path), 1)(images(3))
    assert found.dtype == np.float32
    wanted = squares(3) * 255 if element == UINT8 else expected(3)
    np.testing.assert_allclose(found, wanted, atol=5e-3 if element == FLOAT16 else 1e-4)


def test_sizes_come_from_the_network_then_the_configuration_then_the_file(tmp_path: Path) -> None:
    said = {"image_size": "24", "image_mean": "[0, 0, 0]", "image_std": "[1.0, 1.0, 1.0]"}
    fixed = write_means(tmp_path / "fixed.onnx", 16, metadata=said)
    np.testing.assert_allclose(onnx(of(fixed), 1)(images(2)), squares(2), atol=1e-5)
    free = write_means(tmp_path / "free.onnx", "side", metadata=said)
    np.testing.assert_allclose(onnx(of(free), 1)(images(2)), squares(2, 24), atol=1e-5)
    told = onnx(of(free, size=20, mean=tuple(MEAN), std=tuple(STD)), 1)
    np.testing.assert_allclose(told(images(2)), expected(2, 20), atol=1e-5)
    silent = write_means(tmp_path / "silent.onnx", "side")
    np.testing.assert_allclose(onnx(of(silent), 1)(images(1)), expected(1, 224), atol=1e-5)
    assert identity(of(silent)) != identity(of(silent, size=224)) != identity(of(free, size=224))


def test_vectors_are_found_among_outputs(tmp_path: Path) -> None:
    two = write_means(tmp_path / "two.onnx", 16, outputs=2)
    np.testing.assert_allclose(onnx(of(two, output="negated"), 1)(images(2)), -expected(2), atol=1e-5)
    pooled = write_means(tmp_path / "pooled.onnx", 16, keepdims=True)
    np.testing.assert_allclose(onnx(of(pooled), 1)(images(2)), expected(2), atol=1e-5)
    with pytest.raises(LodesetError, match=r"has no output vector; its outputs are: scores, negated"):
        onnx(of(two, output="vector"), 1)


@pytest.mark.parametrize(
    ("written", "knobs", "told"),
    [
        ({}, {"size": 24}, r"only takes images of 16 x 16 pixels.*says 24: remove `embed: size:`"),
        ({"shape": ("B", 1, 16, 16)}, {}, r"takes \['B', 1, 16, 16\], but images have 3 channels"),
        ({"shape": (1, 16, 16, 4)}, {}, "images have 3 channels"),
        ({"shape": ("B", 3, 16, 24)}, {}, r"images of 16 x 24 pixels \(height x width\), but only squares"),
        (
            {"shape": ("B", 3, 4, 16, 16)},
            {},
            r"takes \['B', 3, 4, 16, 16\], but a network of images takes \[batch, 3, height, width\]",
        ),
        ({"element": INT64}, {}, r"takes tensor\(int64\), but images can be given as .*tensor\(uint8\)"),
        ({"element": UINT8}, {"mean": (0, 0, 0)}, "takes bytes.*remove `embed: mean:`"),
        ({"metadata": {"image_mean": "[1, 2]"}}, {}, r"image_mean = \[1, 2\] instead of three numbers"),
        ({"metadata": {"image_std": "[1, 0, 1]"}}, {}, r"image_std = \[1, 0, 1\] instead of three numbers"),
        ({"metadata": {"image_std": "one"}}, {}, "image_std = 'one', which is not JSON"),
    ],
)
def test_what_cannot_be_given_images_is_refused(
    tmp_path: Path, written: dict[str, Any], knobs: dict[str, Any], told: str
) -> None:
    path = write_means(tmp_path / "m.onnx", 16, **written)
    with pytest.raises(LodesetError, match=rf"m\.onnx.*{told}"):
        onnx(of(path, **knobs), 1)


@pytest.mark.parametrize("batch", [2, 5])
def test_classifiers_of_a_fixed_batch_of_bytes(tmp_path: Path, batch: int) -> None:
    path = write_means(tmp_path / "m.onnx", 16, batch=batch, element=UINT8, channels_last=True)
    scorer = classifier(Classifier(name="blue", path=str(path), index=2, keep="below", threshold=0), 1)
    scores = scorer.scores([scorer.prepare(image) for image in images(7)])
    np.testing.assert_allclose(scores, squares(7)[:, 2] * 255, atol=1e-3)


@pytest.mark.parametrize("layout", [{"batch": 1}, {"batch": 3}, {"batch": 1, "channels_last": True, "element": UINT8}])
def test_a_detector_takes_what_its_file_says(tmp_path: Path, layout: dict[str, Any]) -> None:
    box = (0.25, 0.25, 0.75, 0.5)
    path = write_detector(tmp_path / "faces.onnx", 16, [box], [1.0], **layout)
    given = {"threshold": 0.6} if "element" not in layout else {"threshold": 200}
    faces = Faces.model_validate(
        {"path": str(path), **given, **({} if "element" in layout else {"mean": (0, 0, 0), "std": (1, 1, 1)})}
    )
    detect = detector(faces, 1)
    np.testing.assert_allclose(detect(Image.new("RGB", (200, 100), (230, 230, 230))), [[50, 25, 150, 50]], atol=1e-4)
    assert detect(Image.new("RGB", (200, 100), (20, 20, 20))).shape == (0, 4)
