from pathlib import Path

import numpy as np
import pytest
import torch
from builders import pixels
from PIL import Image

from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.embedders import networks, patches, preprocess
from lodeset.pipeline.embedders.config import OnnxEmbedder, PatchDictionary, TorchScriptEmbedder
from lodeset.pipeline.embedders.models import identity
from lodeset.pipeline.embedders.onnx import onnx
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.tables.vectors import normalised, read_vectors, vector_table

CONFIG = PatchDictionary(size=32, patch=6, stride=2, words=16, dimensions=12, fit_images=40)


def images(count: int, first: int = 0) -> list[Image.Image]:
    return [Image.fromarray(pixels(first + i)) for i in range(count)]


class Mean(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.mean(dim=(2, 3))


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = str(tmp_path / "mean.pt")
    torch.jit.save(torch.jit.trace(Mean(), torch.zeros(1, 3, 16, 16)), path)
    return path


# -- networks


def test_pixels_are_normalised_channels_first() -> None:
    config = TorchScriptEmbedder(kind="torchscript", path="x", size=16)
    ((rows, batch),) = preprocess.inputs(images(2), networks.recipe_of(config))
    assert rows == [0, 1]
    resized = np.asarray(images(1)[0].resize((16, 16), Image.Resampling.BICUBIC, reducing_gap=2.0), dtype=np.float32)
    expected = (resized / 255 - np.array(config.mean)) / np.array(config.std)
    assert batch.shape == (2, 3, 16, 16)
    np.testing.assert_allclose(batch[0], expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript(script: str) -> None:
    config = TorchScriptEmbedder(kind="torchscript", path=script, size=16)
    ((_, batch),) = preprocess.inputs(images(3), networks.recipe_of(config))
    for threads in (1, 2):
        found = networks.torchscript(config, threads)(images(3))
        np.testing.assert_allclose(found, batch.mean(axis=(2, 3)), atol=1e-5)


class Sides(torch.nn.Module):
    """Height and width of what it is given, and the mean of its channels."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        sides = torch.tensor([[float(image.shape[2]), float(image.shape[3])]]).expand(image.shape[0], 2)
        return torch.cat([sides, image.mean(dim=(2, 3))], dim=1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_short_side_alone_keeps_shapes_and_the_order_of_images(tmp_path: Path) -> None:
    """As SSCD's authors prepare images: one call a shape, vectors in the order of the images."""
    torch.jit.save(torch.jit.script(Sides()), tmp_path / "sides.pt")
    config = TorchScriptEmbedder(
        kind="torchscript", path=str(tmp_path / "sides.pt"), size=20, resize="short_side", interpolation="bilinear"
    )
    sizes = [(40, 30), (30, 40), (40, 30), (25, 25), (400, 10)]
    given = [Image.fromarray(pixels(n, width=width, height=height)) for n, (width, height) in enumerate(sizes)]
    found = networks.torchscript(config, 1)(given)
    assert found[:, :2].tolist() == [[20, 26], [26, 20], [20, 26], [20, 20], [20, 80]]
    for image, vector in zip(given, found, strict=True):
        height, width = vector[:2].astype(int)
        plain = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
        expected = ((plain - np.array(config.mean)) / np.array(config.std)).mean(axis=(0, 1))
        np.testing.assert_allclose(vector[2:], expected, atol=0.02)


@pytest.mark.parametrize(("width", "height"), [(90, 40), (40, 90), (32, 32), (33, 200)])
def test_a_crop_is_the_centre_of_the_whole_resized(width: int, height: int) -> None:
    image = Image.fromarray(pixels(1, width=width, height=height))
    recipe = preprocess.Recipe("crop", 24, 30, (0, 0, 0), (1, 1, 1))
    short = min(width, height)
    whole = np.asarray(image.resize((30 * width // short, 30 * height // short), Image.Resampling.BICUBIC))
    top, left = (whole.shape[0] - 24) // 2, (whole.shape[1] - 24) // 2
    expected = whole[top : top + 24, left : left + 24].astype(int)
    assert np.abs(np.asarray(preprocess.resized(image, recipe)).astype(int) - expected).max() <= 3


class Broken(torch.nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if self.how == "feature map":
            return image
        if self.how == "one for all":
            return image.mean(dim=(0, 2, 3)).unsqueeze(0)
        return image[:, :, : image.shape[3] // 5, 0].flatten(1)  # as wide as the image is


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("feature map", r"shape \[3, 3, 20, 26\] for 3 images.*pool it first"),
        ("one for all", r"shape \[1, 3\] for 3 images"),
        ("by shape", r"widths \[12, 15\]"),
    ],
)
def test_a_network_that_gives_no_vectors(tmp_path: Path, how: str, told: str) -> None:
    torch.jit.save(torch.jit.script(Broken(how)), tmp_path / "broken.pt")
    config = TorchScriptEmbedder(kind="torchscript", path=str(tmp_path / "broken.pt"), size=20, resize="short_side")
    given = [Image.fromarray(pixels(n, width=40, height=30)) for n in range(3)]
    if how == "by shape":
        given.append(Image.fromarray(pixels(0, width=30, height=30)))
    with pytest.raises(LodesetError, match=told):
        networks.torchscript(config, 1)(given)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_named_dtype_is_used_and_is_part_of_what_it_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16), torch.nn.Flatten()).eval()
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 16, 16)), tmp_path / "net.pt")
    found, what = {}, {}
    for dtype in ("auto", "fp32", "bf16", "fp16"):
        config = TorchScriptEmbedder(kind="torchscript", path=str(tmp_path / "net.pt"), size=16, dtype=dtype)
        found[dtype], what[dtype] = networks.torchscript(config, 1)(images(3)), str(identity(config))
    assert len(set(what.values())) == 4
    for dtype, step in (("bf16", 2**-8), ("fp16", 2**-11)):
        error = np.abs(found[dtype] - found["fp32"]).max() / np.abs(found["fp32"]).max()
        assert 0 < error < 4 * step
    if not torch.cuda.is_available():
        np.testing.assert_array_equal(found["auto"], found["fp32"])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_that_is_none(tmp_path: Path) -> None:
    broken = tmp_path / "x.onnx"
    with pytest.raises(LodesetError, match="no embedder at"):
        onnx(OnnxEmbedder(kind="onnx", path=str(broken)), 1)
    broken.write_bytes(b"no model")
    with pytest.raises(LodesetError, match="not an ONNX model"):
        onnx(OnnxEmbedder(kind="onnx", path=str(broken)), 1)
    with pytest.raises(LodesetError, match="not a TorchScript file"):
        networks.torchscript(TorchScriptEmbedder(kind="torchscript", path=str(broken)), 1)


def test_identity_follows_the_bytes_not_the_place(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"same")
    (tmp_path / "c.onnx").write_bytes(b"other")
    a, b, c = (
        identity(OnnxEmbedder(kind="onnx", path=str(tmp_path / f"{n}.onnx"), batch=k))
        for n, k in (("a", 1), ("b", 2), ("c", 1))
    )
    assert a == b != c


# -- patch dictionary


def test_activations_are_those_of_a_plain_loop() -> None:
    dictionary = patches.fit(images(40), CONFIG)
    (found,) = patches.embedder(dictionary, CONFIG)(images(1, first=90))

    square = np.asarray(images(1, first=90)[0].resize((32, 32), Image.Resampling.BICUBIC, reducing_gap=2.0)).astype(
        np.float64
    )
    across = (32 - 6) // 2 + 1
    cells = np.zeros((across, across, 16))
    for row in range(across):
        for column in range(across):
            patch = square[2 * row : 2 * row + 6, 2 * column : 2 * column + 6].transpose(2, 0, 1).reshape(-1)
            patch = (patch - patch.mean()) / np.sqrt(patch.var() + 10)
            score = dictionary.words @ ((patch - dictionary.mean) @ dictionary.whiten)
            cells[row, column] = np.maximum(score - score.mean() - score.std(), 0)
    half = across // 2
    quadrants = [cells[:half, :half], cells[:half, half:], cells[half:, :half], cells[half:, half:]]
    pooled = np.concatenate([np.sqrt(q.mean(axis=(0, 1))) for q in quadrants])
    expected = (pooled - dictionary.feature_mean) @ dictionary.project
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_dictionary_is_repeatable_and_does_not_depend_on_the_batch() -> None:
    one, two = patches.fit(images(40), CONFIG), patches.fit(images(40), CONFIG)
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, two.arrays()[name])
    embed = patches.embedder(one, CONFIG)
    np.testing.assert_allclose(embed(images(5)), np.concatenate([embed([i]) for i in images(5)]), atol=1e-4)


def test_copies_are_closer_than_strangers() -> None:
    embed = patches.embedder(patches.fit(images(40), CONFIG), CONFIG)
    vectors = normalised(embed(images(40))).astype(np.float32)
    smaller = [i.resize((40, 34)) for i in images(40)]
    copied = normalised(embed(smaller)).astype(np.float32)
    similarity = vectors @ copied.T
    assert (similarity.argmax(axis=1) == np.arange(40)).mean() > 0.9


def test_too_few_images_for_a_dictionary() -> None:
    with pytest.raises(LodesetError, match=r"embed\.semantic\.words"):
        patches.fit(images(11), PatchDictionary(words=1000))


# -- vectors as stored


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e18, 1e25, 1e37])
def test_vectors_of_any_length_become_of_length_one(scale: float) -> None:
    given = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    mixed = np.stack([given[0] * np.float32(scale), given[1], np.zeros(5, np.float32)])
    found = normalised(mixed).astype(np.float64)
    np.testing.assert_allclose(found[:2], normalised(given[:2]), atol=1e-3)
    assert not found[2].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_vectors_that_are_not_finite_stay_so(value: float) -> None:
    assert not np.isfinite(normalised(np.array([[value, 1.0]], np.float32))).all()


def test_vectors_round_trip(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    vectors = normalised(np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-3)
    part = store.commit_part("embed", "k", {"vectors": vector_table(list("abcde"), vectors)})
    ids, found = read_vectors(store, [part.files["vectors"]])
    assert ids == list("abcde")
    np.testing.assert_array_equal(found, vectors)
    other = store.commit_part("embed", "j", {"vectors": vector_table(["f"], vectors[:1, :3])})
    with pytest.raises(LodesetError, match="widths"):
        read_vectors(store, [part.files["vectors"], other.files["vectors"]])
